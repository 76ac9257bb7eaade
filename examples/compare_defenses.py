"""Repair one backdoored model by three defenses, and compare what is left of the backdoor."""

from pathlib import Path

import torch

from rnp import RNP
from rnp.attacks.badnets import BadNets
from rnp.attacks.base import backdoored_test_set
from rnp.data.base import Split
from rnp.data.digits import Digits
from rnp.defenses.bnp import BNP
from rnp.defenses.ft import FT
from rnp.evaluation.metrics import defense_effectiveness, score
from rnp.models.build import Architecture
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.training.augment import Augment
from rnp.training.recipe import Train
from rnp.unlearn import Unlearn

torch.set_num_threads(1)  # the fastest for so small a network
as_is = Augment(crop=0, flip=False)  # a mirrored digit is no digit
rng = torch.Generator().manual_seed(1)
train, test = Digits(size=16).load(Path(), rng=rng)
data = Split(defense_train=200, defense_val=200)(train, test, rng=rng)
attack = BadNets()
poisoned = attack.poison(data.pool, rng=rng)
network = Architecture(arch="resnet10", width=8).build_for(data.pool, rng=rng)
recipe = Train(epochs=8, batch_size=32, weight_decay=0.005, augment=as_is)
backdoored = recipe(network, poisoned.apply(data.pool), rng=rng)
triggered = backdoored_test_set(poisoned.trigger, test, attack.target)
before = score(backdoored, test, triggered, attack.target)

# Both pruning defenses take neurons until 3 % of the defender's images are lost.
prune = Prune(rule="accuracy_drop", max_accuracy_drop=0.03, max_fraction=0.3)
rnp = RNP(unlearn=Unlearn(augment=as_is), recover=Recover(augment=as_is), prune=prune)
print(f"{'defense':<8} {'CA':>5} {'ASR':>5} {'DER':>5}")
for defense in (FT(steps=200, augment=as_is), BNP(prune=prune), rnp):
    repaired = defense.repair(backdoored, data.defense, rng=rng).model
    after = score(repaired, test, triggered, attack.target)
    ca, asr = after.clean_accuracy.value, after.attack_success_rate.value
    print(f"{defense.name:<8} {ca:.3f} {asr:.3f} {defense_effectiveness(before, after):.3f}")
