"""Our architectures and the published width of their first stage; needs no PyTorch to list."""

TORCHVISION = "torchvision:"
TIMM = "timm:"
ARCHITECTURES = {
    "resnet10": 64,
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "preactresnet18": 64,
    "wrn16_1": 16,
    "resnet18_gn": 64,
    "vgg11": 64,
    "vgg19_bn": 64,
    "mobilenet_v2": 32,
    "convnext": 40,
    "vit": 256,
}
