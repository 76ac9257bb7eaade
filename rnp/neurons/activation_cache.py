"""Repeated forward passes of a network that changes one layer at a time.

Each pass starts behind the last part that has not changed.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rnp.neurons.masks import NORMS
from rnp.training.device import Precision, autocast, device_of
from rnp.training.predict import eval_batches
from rnp.types import Bytes, Logits, to_floats

BUDGET = 3 * 2**28
"""Bytes of activations that are kept."""
PURE_MODULES = (nn.Conv2d, nn.Linear, *NORMS)
"""They never change their input in place; activations may."""


class ActivationCache:
    """Logits of the same images again and again, in eval mode.

    Activations are kept where a single tensor connects what comes before with what comes after. A
    network that PyTorch cannot trace runs as a whole each time.
    """

    def __init__(self, model: nn.Module, images: Bytes, precision: Precision) -> None:
        self.model = model.eval()
        self.precision: Precision = precision
        self.device = device_of(model)
        self.batches = eval_batches(images)
        self.graph = self._trace()
        self.nodes = list(self.graph.graph.nodes) if self.graph else []
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.cached_nodes = self._affordable_nodes(len(images)) if len(images) else []
        # One dictionary for each batch: of the committed network, and of the last pass.
        self.committed: list[dict[fx.Node, Tensor]] = [{} for _ in self.batches]
        self.latest: list[dict[fx.Node, Tensor]] = [{} for _ in self.batches]
        self.first_changed = 0

    @torch.no_grad()
    def _trace(self) -> fx.GraphModule | None:
        """The graph of the network, if it computes what the network computes."""
        images = self._load(self.batches[0][:1])
        try:
            graph = fx.symbolic_trace(self.model)
            with autocast(self.precision, self.device):
                return graph if torch.equal(graph(images), self.model(images)) else None
        except Exception:  # the tracer may fail in many ways where the network itself works
            return None

    @torch.no_grad()
    def logits(self, *changed_layers: str) -> Logits:
        """Logits on the CPU.

        `changed_layers` are all layers that have changed since the last `commit`; without any,
        everything is computed again.
        """
        self.first_changed = next(
            (i for i, node in enumerate(self.nodes) if reads_any(node, changed_layers)), 0
        )
        return torch.cat([self._run(i) for i in range(len(self.batches))])

    def commit(self) -> None:
        """Keep the activations of the last pass: the network stays as it was then."""
        for committed, latest in zip(self.committed, self.latest):
            for node in list(committed):
                if self.position[node] >= self.first_changed:
                    del committed[node]
            committed |= latest

    def _run(self, i: int) -> Logits:
        """Logits of one batch, from the last valid activation on."""
        with autocast(self.precision, self.device):
            if self.graph is None:
                return self.model(self._load(self.batches[i])).float().cpu()
            recorder = NodeRecorder(self.graph, self.cached_nodes)
            valid = [node for node in self.committed[i] if self._is_valid(node)]
            if valid:
                start = max(valid, key=self.position.__getitem__)
                known = self._skip_before(start) | {start: self.committed[i][start]}
                logits = recorder.run(None, initial_env=known)
            else:
                logits = recorder.run(self._load(self.batches[i]))
            self.latest[i] = recorder.values
            return logits.float().cpu()

    def _is_valid(self, node: fx.Node) -> bool:
        return self.position[node] < self.first_changed

    def _skip_before(self, start: fx.Node) -> dict[fx.Node, None]:
        """Placeholders for the values before `start`, so that they are not computed."""
        before = self.nodes[: self.position[start]]
        return {node: None for node in before if node.op != "get_attr"}

    def _load(self, images: Bytes) -> Tensor:
        return to_floats(images.to(self.device))

    @torch.no_grad()
    def _affordable_nodes(self, n: int) -> list[fx.Node]:
        """The last cut points, as many as the budget allows for `n` images."""
        if self.graph is None:
            return []
        recorder = NodeRecorder(self.graph, cut_points(self.nodes))
        with autocast(self.precision, self.device):
            recorder.run(self._load(self.batches[0][:1]))
        affordable = []
        bytes_left = BUDGET // 2  # the activations of the last pass take the other half
        for node, value in reversed(recorder.values.items()):
            bytes_left -= n * value.numel() * value.element_size()
            if bytes_left < 0:
                break
            affordable.append(node)
        return affordable


def reads_any(node: fx.Node, layers: tuple[str, ...]) -> bool:
    """Whether the node uses the weights of one of `layers`.

    It does when it runs the layer, or a module that contains it, or gets a weight by name.
    """
    target = str(node.target)
    if node.op == "call_module":
        return any(f"{layer}.".startswith(f"{target}.") for layer in layers)
    return node.op == "get_attr" and any(target.startswith(f"{layer}.") for layer in layers)


class NodeRecorder(fx.Interpreter):
    """Runs a graph and records the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, recorded: list[fx.Node]) -> None:
        super().__init__(graph)
        self.recorded = set(recorded)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.recorded:
            self.values[n] = value
        return value


def cut_points(nodes: list[fx.Node]) -> list[fx.Node]:
    """Nodes whose value is all that later nodes need, and that none of these changes in place."""
    position = {node: i for i, node in enumerate(nodes)}
    cuts = []
    last_use = 0  # of all values before the node
    for i, node in enumerate(nodes):
        alone = last_use <= i and node.op not in ("placeholder", "get_attr", "output")
        if alone and node.users and all(is_pure(user) for user in node.users):
            cuts.append(node)
        if node.op != "get_attr":
            last_use = max(last_use, *(position[user] for user in node.users), -1)
    return cuts


def is_pure(node: fx.Node) -> bool:
    """Whether the node is known not to change its input in place."""
    if node.op == "call_module":
        network = cast("nn.Module", node.graph.owning_module)
        module = network.get_submodule(str(node.target))
        if isinstance(module, nn.Identity):
            return all(is_pure(user) for user in node.users)
        return isinstance(module, PURE_MODULES)
    return node.target in (operator.add, F.avg_pool2d)
