"""Find the triggered images among those that a backdoored model receives."""

from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from rnp.attacks.badnets import BadNets
from rnp.attacks.base import backdoored_test_set
from rnp.data.base import Split
from rnp.data.digits import Digits
from rnp.detection.samples.mahalanobis import Mahalanobis
from rnp.detection.samples.strip import Strip
from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence
from rnp.models.build import Architecture
from rnp.training.augment import Augment
from rnp.training.recipe import Train
from rnp.unlearn import Unlearn

torch.set_num_threads(1)  # the fastest for so small a network
as_is = Augment(crop=0, flip=False)  # a mirrored digit is no digit
rng = torch.Generator().manual_seed(0)
train, test = Digits(size=16).load(Path(), rng=rng)
data = Split(defense_train=200, defense_val=200)(train, test, rng=rng)
attack = BadNets()
poisoned = attack.poison(data.pool, rng=rng)
network = Architecture(arch="resnet10", width=8).build_for(data.pool, rng=rng)
recipe = Train(epochs=8, batch_size=32, weight_decay=0.005, augment=as_is)
backdoored = recipe(network, poisoned.apply(data.pool), rng=rng)

# The model receives all clean test images, and those of nine classes with the patch on.
triggered = backdoored_test_set(poisoned.trigger, test, attack.target)
images = torch.cat([test.images, triggered.images])
is_triggered = torch.arange(len(images)) >= len(test)

clean = data.defense
unlearned = Unlearn(stop_accuracy=0.2, augment=as_is)(backdoored, clean.train, rng=rng).model
print(f"{len(images)} images, {len(triggered)} of them triggered")
for detector in (UnlearnedConfidence(), Mahalanobis(), Strip(overlays=16)):
    scores = detector.score(backdoored, images, clean.val, rng=rng, unlearned=unlearned)
    print(f"{detector.name:<22} AUROC {roc_auc_score(is_triggered, scores):.3f}")
