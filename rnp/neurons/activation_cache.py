"""Forward passes of a network that changes one layer at a time: each starts behind the last part
that stayed the same.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rnp.neurons.masks import NORMS
from rnp.training.device import Precision, autocast, device_of
from rnp.training.predict import eval_batches
from rnp.types import Bytes, Logits, to_floats

BUDGET = 3 * 2**28  # bytes of activations that are kept
LEAVE_ALONE = (
    nn.Conv2d,
    nn.Linear,
    *NORMS,
)  # they never change their input in place; activations may


class ActivationCache:
    """Logits of the same images again and again, in eval mode.

    Activations are kept where a single tensor connects what comes before with what comes after. A
    network that PyTorch cannot trace runs as a whole each time.
    """

    def __init__(self, model: nn.Module, images: Bytes, precision: Precision) -> None:
        self.model, self.precision, self.device = model.eval(), precision, device_of(model)
        self.parts = eval_batches(images)
        self.graph = self._traced()
        self.nodes = list(self.graph.graph.nodes) if self.graph else []
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.cuts = self._affordable(len(images)) if len(images) else []
        self.kept: list[dict[fx.Node, Tensor]] = [{} for _ in self.parts]
        self.fresh: list[dict[fx.Node, Tensor]] = [{} for _ in self.parts]
        self.changed = 0

    @torch.no_grad()
    def _traced(self) -> fx.GraphModule | None:
        """The network's graph, if it says what the network says."""
        images = self._input(0)[:1]
        try:
            graph = fx.symbolic_trace(self.model)
            with autocast(self.precision, self.device):
                return graph if torch.equal(graph(images), self.model(images)) else None
        except Exception:  # whatever a tracer stumbles over, the network itself may work
            return None

    @torch.no_grad()
    def logits(self, *layers: str) -> Logits:
        """Logits on the CPU; `layers` are all that has changed since the last `keep`, everything
        when there are none.
        """
        self.changed = next(
            (i for i, node in enumerate(self.nodes) if any(reads(node, layer) for layer in layers)),
            0,
        )
        return torch.cat([self._run(i) for i in range(len(self.parts))])

    def commit(self) -> None:
        """The network stays as it was for the last logits."""
        for kept, fresh in zip(self.kept, self.fresh):
            for node in [node for node in kept if self.place[node] >= self.changed]:
                del kept[node]
            kept |= fresh

    def _run(self, i: int) -> Logits:
        with autocast(self.precision, self.device):
            if self.graph is None:
                return self.model(self._input(i)).float().cpu()
            run = NodeRecorder(self.graph, self.cuts)
            valid = [node for node in self.kept[i] if self.place[node] < self.changed]
            if valid:
                start = max(valid, key=self.place.__getitem__)
                done = {
                    node: None for node in self.nodes[: self.place[start]] if node.op != "get_attr"
                }
                logits = run.run(None, initial_env=done | {start: self.kept[i][start]})
            else:
                logits = run.run(self._input(i))
            self.fresh[i] = run.seen
            return logits.float().cpu()

    def _input(self, i: int) -> Tensor:
        return to_floats(self.parts[i].to(self.device))

    @torch.no_grad()
    def _affordable(self, n: int) -> list[fx.Node]:
        """The places to keep, from the last ones on, as many as the budget allows for `n`
        images.
        """
        if self.graph is None:
            return []
        run = NodeRecorder(self.graph, cut_points(self.nodes))
        with autocast(self.precision, self.device):
            run.run(self._input(0)[:1])
        chosen, bytes_left = [], BUDGET // 2  # those of the last `keep`, and fresh ones beside them
        for node, value in reversed(run.seen.items()):
            bytes_left -= n * value.numel() * value.element_size()
            if bytes_left < 0:
                break
            chosen.append(node)
        return chosen


def reads(node: fx.Node, layer: str) -> bool:
    """Whether the node takes the weights of `layer`: it runs it, or a module that holds it, or
    fetches a weight by name.
    """
    if node.op == "call_module":
        return f"{layer}.".startswith(f"{node.target}.")
    return node.op == "get_attr" and node.target.startswith(f"{layer}.")


class NodeRecorder(fx.Interpreter):
    """Runs a graph and remembers the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, wanted: list[fx.Node]) -> None:
        super().__init__(graph)
        self.wanted, self.seen = set(wanted), {}

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node in self.wanted:
            self.seen[node] = value
        return value


def cut_points(nodes: list[fx.Node]) -> list[fx.Node]:
    """Nodes whose value is all that later ones need, and that none of those changes in place."""
    place = {node: i for i, node in enumerate(nodes)}
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    found, reach = [], 0  # the last use of anything that came before
    for i, node in enumerate(nodes):
        alone = reach <= i and node.op not in ("placeholder", "get_attr", "output")
        if alone and node.users and all(is_pure(user) for user in node.users):
            found.append(node)
        if node.op != "get_attr":
            reach = max(reach, last[node])
    return found


def is_pure(node: fx.Node) -> bool:
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(node.target)
        return isinstance(module, LEAVE_ALONE) or (
            isinstance(module, nn.Identity) and all(map(is_pure, node.users))
        )
    return node.target in (operator.add, F.avg_pool2d)
