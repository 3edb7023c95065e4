"""The switches of all layers of a model: set to a plan, with what takes places on the devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adaskip.blocks import BlockSpec, execution_device
from adaskip.patching import Patch, patch_forward
from adaskip.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.recorders import StepRecording
from adaskip.replacements import Linear, Replacement, Window
from adaskip.sublayers import Switches, layer_forward
from adaskip.windows import Windows

# By first layer, number of gains and device. CUDA graphs read them where they lay when they were
# recorded, so the next session writes into the same ones.
_GAINS: WeakKeyDictionary[nn.Module, dict[int, dict[torch.device, Tensor]]] = WeakKeyDictionary()


class Switchboard:
    """Sets what each layer does in the coming forward.

    Args:
        layers: of the model.
        block: their family's row.
        dtype: the model computes in.

    Attributes:
        layers: of the model.
        devices: of each layer.
        dtype: the model computes in.
        windows: of the attention that has one.
        plan: that the switches are set to; None where setting them has failed.
        recording: where statistics of the coming forward go; None if nobody wants any.
    """

    def __init__(self, layers: Iterable[nn.Module], block: BlockSpec, dtype: torch.dtype) -> None:
        self.layers = list(layers)
        self.devices = [execution_device(layer) for layer in self.layers]
        self._switches = [Switches() for _ in self.layers]
        self.windows = Windows(self.layers, block, self._switches, self.devices)
        self.plan: SkipPlan | None = EMPTY_PLAN
        self.recording: StepRecording | None = None
        self._patches: list[Patch] = []
        self._block = block
        self.dtype = dtype
        self._gains: dict[torch.device, Tensor] = {}
        self._learns = False
        # Whether a backward pass may need the gains as they are.
        self._has_gradients = True

    @property
    def is_outdated(self) -> bool:
        """Whether the same plan has to be set again: its numbers would be old, or not last.

        A map that learns changes, and gains set without gradients are written over later, perhaps
        before the backward pass.
        """
        return self._learns or (torch.is_grad_enabled() and not self._has_gradients)

    def patches(self) -> Iterator[Patch]:
        """Lets each layer look at its switches, patch by patch."""
        for index, (layer, switches) in enumerate(zip(self.layers, self._switches, strict=True)):
            patch = patch_forward(layer, layer_forward(layer, index, self._block, switches))
            self._patches.append(patch)
            yield patch

    def obey(self, *, obeyed: bool) -> None:
        """Lets the layers look at their switches, or do what they do without.

        Between the forwards of a model, another one that has the same layers may run.
        """
        for patch in self._patches:
            patch.in_place = obeyed

    def record_to(self, recording: StepRecording | None) -> None:
        """Tells every layer where its statistics go."""
        self.recording = recording
        for switch in self._switches:
            switch.recording = recording

    def take_maps(self, plan: SkipPlan) -> None:
        """Takes a plan's linear maps to the devices, so that its first forward need not."""
        for sublayer, replacement in plan.items():
            if isinstance(replacement, Linear):
                self._placed(sublayer, replacement)

    def set(self, plan: SkipPlan) -> None:
        """Switches every layer to the plan, and takes its replacements to the devices."""
        self.plan = None
        self._has_gradients = torch.is_grad_enabled()
        self._learns = any(isinstance(r, Linear) and r.learns for r in plan.values())
        gains = {s.position: gain for s, gain in plan.gains.items() if gain is not None}
        if gains:
            self._copy_gains([gains.get(p, 1.0) for p in range(2 * len(self.layers))])
        self.windows.place(plan)
        skipped = set(plan.layers("attn"))
        for index, switch in enumerate(self._switches):
            attn, ffn = Sublayer(index, "attn"), Sublayer(index, "ffn")
            switch.run_attn, switch.run_ffn = index not in skipped, ffn not in plan
            switch.attn_replacement = self._placed(attn, plan.get(attn))
            switch.ffn_replacement = self._placed(ffn, plan.get(ffn))
        self.plan = plan

    def _placed(self, sublayer: Sublayer, replacement: Replacement) -> Tensor | Linear | None:
        """What takes a sublayer's place, on its device."""
        if replacement is None or isinstance(replacement, Window):
            return None
        device = self.devices[sublayer.layer]
        if not isinstance(replacement, Linear):
            return self._gains[device][sublayer.position]
        return replacement.on(device, self.dtype)

    def _copy_gains(self, values: list[float]) -> None:
        """Writes the gains into the tensors that compiled graphs read."""
        host = torch.tensor(values, device="cpu", dtype=torch.float32)
        lasting = _GAINS.setdefault(self.layers[0], {}).setdefault(len(values), {})
        # A backward pass still to come needs the numbers of its own forward.
        self._gains = {} if self._has_gradients else lasting
        for device in set(self.devices):
            if device not in self._gains:
                with torch.inference_mode(False):
                    self._gains[device] = torch.ones_like(host, device=device)
            # From pinned memory, a copy does not wait for the device.
            source = host.pin_memory() if device.type == "cuda" else host
            self._gains[device].copy_(source, non_blocking=True)
