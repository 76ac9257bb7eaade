"""Train a classifier with a backdoor, then remove the backdoor with 400 clean images."""

from pathlib import Path

import torch

from rnp import RNPFT
from rnp.attacks.badnets import BadNets
from rnp.attacks.base import backdoored_test_set
from rnp.data.base import Split
from rnp.data.digits import Digits
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.evaluation.metrics import score
from rnp.models.build import Architecture
from rnp.recover import Recover
from rnp.training.augment import Augment
from rnp.training.recipe import Train
from rnp.unlearn import Unlearn

torch.set_num_threads(1)  # the fastest for so small a network
as_is = Augment(crop=0, flip=False)  # a mirrored digit is no digit
rng = torch.Generator().manual_seed(0)
train, test = Digits(size=16).load(Path(), rng=rng)
data = Split(defense_train=200, defense_val=200)(train, test, rng=rng)

# The attacker puts a patch on a tenth of the training images and labels these as class 0.
attack = BadNets()
poisoned = attack.poison(data.pool, rng=rng)
network = Architecture(arch="resnet10", width=8).build_for(data.pool, rng=rng)
recipe = Train(epochs=8, batch_size=32, weight_decay=0.005, augment=as_is)
backdoored = recipe(network, poisoned.apply(data.pool), rng=rng)

# The defender has the model and 400 clean images, and never sees the patch.
steps = {"unlearn": Unlearn(augment=as_is), "recover": Recover(augment=as_is)}
defense = RNPFT(**steps, search=NeuralCleanse(steps=50), steps=100, augment=as_is)
repaired = defense.repair(backdoored, data.defense, rng=rng).model

triggered = backdoored_test_set(poisoned.trigger, test, attack.target)
for name, model in {"backdoored": backdoored, "repaired": repaired}.items():
    scores = score(model, test, triggered, attack.target)
    ca, asr = scores.clean_accuracy.value, scores.attack_success_rate.value
    print(f"{name:<12} CA {ca:.3f}  ASR {asr:.3f}")
