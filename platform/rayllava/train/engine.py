"""DeepSpeed behind a few verbs: backward, step, gather, load. Runs without Ray.

The loss of a step is the sum over its target tokens divided by their global number. Ranks may hold different
numbers of atoms, so DeepSpeed's own averaging over micro batches is switched off: each atom's summed loss is
scaled by W / N_global here, and gradients are averaged over the W ranks by DeepSpeed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayllava.model.build import read_tensors
from rayllava.model.forward import LossModel, tensors
from rayllava.model.normalise import normalise
from rayllava.model.quant import rest
from rayllava.model.tuning import parameter_groups
from rayllava.recipe import Recipe
from rayllava.records import Batch

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """A model, its optimizer and their ZeRO partition, on one rank of an initialised process group."""

    def __init__(self, model: LossModel, recipe: Recipe, *, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has renamed, and is told so at every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed

        # What it would have g++ compile on every CPU node is for a collective that training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.recipe = recipe
        self.device = device
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.zero = recipe.scale.zero
        self._copies: dict[str, Tensor] = {}
        if recipe.scale.checkpointing:
            model.recompute()
        _train(model)
        optim = recipe.optim
        optimizer = torch.optim.AdamW(parameter_groups(model, optim), betas=optim.betas, eps=optim.eps)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=_config(recipe)
        )

    def backward(self, batch: Batch, *, num_targets: int, last: bool, seed: int) -> float:
        """Add the gradients of one atom and return its summed loss.

        `num_targets` counts the whole step on all ranks; `last` is true for this rank's last atom of the step.
        Dropout draws from `seed`, so that it is the same on whichever rank and in whichever order atoms are computed.
        """
        torch.manual_seed(seed)  # of the CPU and of every GPU
        loss = self.deepspeed(**tensors(batch, self.device))
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * (self.world_size / num_targets), scale_wrt_gas=False)
        return float(loss.detach())

    def step(self, factor: float) -> None:
        """Update the weights with every base learning rate times `factor`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.deepspeed.step()

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over the ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.device.type == "cuda":
            total = total.to(self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    @property
    def llava(self) -> Any:
        """The model itself; under ZeRO-3 its weights are elsewhere."""
        return self.deepspeed.module.llava

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; None under ZeRO-0, which does not keep it."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    # -- looking without training: no gradient, no dropout, nothing moved; all collective -------------------

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Hold the model still inside the block, for `loss` and `answer`."""
        model = self.deepspeed.module
        rest(model)
        try:
            with torch.no_grad():
                yield
        finally:
            _train(model)

    def loss(self, batch: Batch) -> float:
        """Return the summed loss of a batch. Under ZeRO-3 every rank must come with one."""
        return float(self.deepspeed(**tensors(batch, self.device)))

    def answer(self, ids: Tensor, mask: Tensor, pixels: Tensor, *, max_new_tokens: int) -> Tensor:
        """Return greedy continuations, (B, at most max_new_tokens), padded behind their stop token.

        ids and mask (B, T) int64 with padding on the left; pixels (N, 3, S, S) uint8 in textual order. Every rank
        must come with a batch; they go on until the last has ended.
        """
        from transformers import GenerationConfig

        llava, spec = self.deepspeed.module.llava, self.deepspeed.module.spec
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(spec.stop_token_ids),
            pad_token_id=spec.pad_token_id,
        )
        dtype = llava.get_input_embeddings().weight.dtype
        pictures = normalise(pixels.to(self.device), spec, dtype=dtype) if len(pixels) else None
        said = llava.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            pixel_values=pictures,
            generation_config=greedy,
            synced_gpus=self.world_size > 1,
        )
        return said[:, ids.shape[1] :].cpu()

    # -- state without a world size ----------------------------------------------------------------------

    def gather(self) -> dict[str, Tensor]:
        """Return this rank's share of the trained state, float32 copies on the CPU by their stored names. Collective.

        Every parameter is gathered in turn and kept by one rank, so no rank holds the whole. The copies stay the
        engine's and the next call fills them anew, so what is written from them has to be written by then: memory
        that is used for the first time costs several times what the copying does.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_states()
        for index, (name, parameter) in enumerate(self._trained()):
            if self._plain:
                state = self.optimizer.state[parameter]
                full = [parameter.data, *(state[moment] for moment in _MOMENTS)]
            else:
                full = [safe_get_full_fp32_param(parameter)]
                full += [safe_get_full_optimizer_state(parameter, moment) for moment in _MOMENTS]
            if index % self.world_size == self.rank:
                for kind, tensor in zip(("param", *_MOMENTS), full, strict=True):
                    assert tensor.shape == _full_shape(parameter), f"{kind} of {name} is not whole"
                    key = f"{kind}/{name}"
                    if key not in self._copies:
                        self._copies[key] = torch.empty(tensor.shape, dtype=torch.float32)
                    self._copies[key].copy_(tensor.detach())
        return self._copies

    def load(self, checkpoint_dir: Path | None, *, step: int, rehearsed: Batch) -> None:
        """Take over weights, moments and step count of a checkpoint saved under any ZeRO stage and world size.

        The weights must already lie in the module that this engine was made of (model.build.lay_over): what
        DeepSpeed derived from them at start-up cannot be replaced afterwards in every stage. Without a checkpoint
        the engine stands before its first step. `rehearsed` is computed first, without effect: the optimizer's
        states exist after a step alone, and a batch that is too large for the memory shows here.
        """
        import deepspeed.utils as ds

        set_weight = ds.safe_set_local_fp32_param if self.zero == 3 else ds.safe_set_full_fp32_param
        set_moment = ds.safe_set_local_optimizer_state if self.zero == 3 else ds.safe_set_full_optimizer_state
        self._rehearse(rehearsed)
        self._link_states()
        trained = dict(self._trained())
        for kind in ("param", *_MOMENTS):
            if checkpoint_dir is None:
                break
            missing = set(trained)
            for name, tensor in read_tensors(checkpoint_dir, f"{kind}/"):
                parameter = trained[name]
                missing.discard(name)
                tensor = tensor.to(self.device)
                if self.zero == 3:
                    tensor = self._part(tensor)
                if kind == "param":
                    if not self._plain:
                        set_weight(parameter, tensor)
                elif self._plain:
                    self.optimizer.state[parameter][kind].copy_(tensor)
                else:
                    set_moment(parameter, tensor, kind)
            assert not missing, f"checkpoint {checkpoint_dir} lacks {kind} of {sorted(missing)[:3]}"
        for state in self._inner.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], float(step))

    def _part(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a tensor as ZeRO-3 cuts it: all are as long, so the last one ends with padding.

        DeepSpeed 0.19.8 does the same when it gathers a tensor, but not when it is given a whole one.
        """
        size = -(-tensor.numel() // self.world_size)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, size * self.world_size - tensor.numel()))
        return padded[size * self.rank : size * (self.rank + 1)]

    def _rehearse(self, batch: Batch) -> None:
        """Do a step that changes nothing: rate 0, loss times 0."""
        loss = self.deepspeed(**tensors(batch, self.device))
        assert torch.isfinite(loss), "the model's very first loss is no number"
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.deepspeed.backward(0.0 * loss, scale_wrt_gas=False)
        self.step(0.0)

    def _link_states(self) -> None:
        """Tie the optimizer's states to parameters in every group.

        DeepSpeed 0.19.8 does that after the first group of the first step and so forgets all later groups.
        """
        link = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            self.optimizer._hp_optimizer_states_linked = False
            link()

    @property
    def _plain(self) -> bool:
        """True where DeepSpeed left the optimizer as it is: float32 without ZeRO."""
        return self.zero == 0 and self.recipe.scale.dtype == "float32"

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.llava.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


def _train(model: LossModel) -> None:
    """Put the model in training mode, a tower that stays as it is apart."""
    model.train()
    model.llava.model.vision_tower.train(model.tower_trains)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _config(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every number that its versions disagree about written out."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.clip,
        "bf16": {"enabled": recipe.scale.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": recipe.scale.zero,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
