"""What a tuning trains changes, and nothing else; adapters begin without effect, are drawn alike and fold away."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.ledger import LedgerEntry
from rayllava.checkpoint.run import RunManifest, write_run
from rayllava.checkpoint.saver import Saver
from rayllava.checkpoint.store import Store, decide
from rayllava.families import FAMILIES
from rayllava.model.build import build, initial, lay_over, result
from rayllava.model.forward import LossModel, tensors
from rayllava.model.seed import seed_of
from rayllava.model.tuning import adapt, census, merge, parameter_groups, tune
from rayllava.place import Place
from rayllava.recipe import LoRA, ModelSpec, OptimSpec, Projector, QLoRA, Recipe, TowerFull, TowerLoRA, Tuning
from tests.tiny import processor_spec
from tests.train.training import batch_of
from tests.train.training import recipe as recipe_of

SPEC = processor_spec()
FAMILY = FAMILIES["vicuna"]
CPU = torch.device("cpu")

VISION: list[dict[str, Any]] = [{"kind": "frozen"}, {"kind": "lora", "r": 4}, {"kind": "full"}]
LLM: list[dict[str, Any]] = [
    {"kind": "projector"},
    {"kind": "projector", "quant": "nf4"},
    {"kind": "full"},
    {"kind": "lora", "r": 4},
    {"kind": "qlora", "r": 4},
]
TUNINGS = [llm | {"vision": vision} for llm, vision in itertools.product(LLM, VISION)]


def tuning_of(words: dict[str, Any], parts: ModelSpec) -> Tuning:
    return recipe_of(parts, 0, tuning=words).tuning


def named(words: dict[str, Any]) -> str:
    return "-".join([words["kind"], *filter(None, [words.get("quant")]), words["vision"]["kind"]])


def policy(words: dict[str, Any]) -> re.Pattern[str]:
    """Return what the names of trained tensors look like. The tower has three blocks; -2 is the second's output."""
    layer = r"model\.language_model\.layers\.[01]\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    block = r"model\.vision_tower\.encoder\.layers\.[01]\."
    adapter = r"\.lora_[AB]\.default\.weight"
    llm = {"full": r"model\.language_model\..*|lm_head\.weight", "lora": layer + adapter, "qlora": layer + adapter}
    vision = {
        "lora": block + r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])" + adapter,
        "full": rf"{block}.*|model\.vision_tower\.(embeddings|pre_layrnorm)\..*",
    }
    kinds = [llm.get(words["kind"]), vision.get(words["vision"]["kind"]), r"model\.multi_modal_projector\..*"]
    return re.compile("|".join(kind for kind in kinds if kind))


def state(llava: nn.Module) -> dict[str, torch.Tensor]:
    """Return the bits of every parameter; NF4 lies in floats that are none."""
    return {name: p.detach().clone().view(torch.uint8) for name, p in llava.named_parameters()}


@pytest.mark.parametrize("words", TUNINGS, ids=named)
def test_exactly_what_the_tuning_names_changes_in_two_steps(words: dict[str, Any], parts: ModelSpec) -> None:
    llava = build(parts, SPEC, seed=1)
    names = tune(llava, tuning_of(words, parts), FAMILY, seed=1)
    before = state(llava)
    assert names == sorted(name for name in before if policy(words).fullmatch(name))
    steps(LossModel(llava, SPEC), 2)
    after = state(llava)
    assert sorted(name for name in after if not torch.equal(after[name], before[name])) == names
    assert sum(tensors for tensors, _ in census(llava).values()) == len(names)


def steps(model: LossModel, num: int) -> list[float]:
    """Train on one batch and return its loss before every step."""
    model.train()
    model.llava.model.vision_tower.train(model.tower_trains)
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimSpec(lr=1e-2)))
    found = []
    for _ in range(num):
        torch.manual_seed(0)
        loss = model(**tensors(batch_of([0, 1, 2, 3]), CPU))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("words", TUNINGS, ids=named)
def test_activations_computed_anew_give_the_same_training(words: dict[str, Any], parts: ModelSpec) -> None:
    curves = []
    for again in (False, True):
        llava = build(parts, SPEC, seed=1)
        tune(llava, tuning_of(words, parts), FAMILY, seed=1)
        model = LossModel(llava, SPEC)
        if again:
            model.recompute()
        curves.append(steps(model, 4))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_adapters_change_nothing_until_they_are_trained(parts: ModelSpec) -> None:
    llava = build(parts, SPEC, seed=1)
    batch = tensors(batch_of([0, 1, 2, 3]), CPU)
    with torch.no_grad():
        want = LossModel(llava, SPEC)(**batch)
        tune(llava, LoRA(vision=TowerLoRA()), FAMILY, seed=1)
        assert torch.equal(LossModel(llava.eval(), SPEC)(**batch), want)


def test_adapters_are_drawn_from_the_recipes_seed_alone(parts: ModelSpec) -> None:
    def drawn(seed: int, words: dict[str, Any]) -> dict[str, torch.Tensor]:
        llava = build(parts, SPEC, seed=1)
        torch.manual_seed(int(torch.randint(1000, ())))  # of no meaning
        state = torch.random.get_rng_state()
        tune(llava, tuning_of(words, parts), FAMILY, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was drawn from"
        return {n: p.detach() for n, p in llava.named_parameters() if ".lora_A." in n or "projector" in n}

    plain = drawn(3, {"kind": "projector"})
    lora = drawn(3, {"kind": "lora", "r": 4})
    both = drawn(3, {"kind": "qlora", "r": 4, "vision": VISION[1]})
    assert all(torch.equal(both[name], tensor) for name, tensor in {**plain, **lora}.items())
    assert not any(
        torch.equal(drawn(4, LLM[3] | {"vision": VISION[0]})[n], t) for n, t in lora.items() if "lora" in n
    )
    weight = lora["model.language_model.layers.0.mlp.down_proj.lora_A.default.weight"]  # (4, 128)
    bound = 128**-0.5
    assert 0.9 * bound < weight.abs().max() <= bound and abs(float(weight.mean())) < 0.2 * bound


def test_a_seed_depends_on_all_it_is_for() -> None:
    assert seed_of(42, "atom", 0, 17, 3) == 2872399347455824210, "a draw that moves changes every run that goes on"
    places = [(1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "b", 2), (1, "a", 2, 0), (1, "a2")]
    assert len({seed_of(*place) for place in places}) == len(places)  # type: ignore[arg-type]


def randomised(llava: Any) -> Any:
    """Give the adapters an effect: B is zero at first, which would make every comparison hold."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return llava


def test_folded_adapters_compute_what_they_computed_beside_the_weights(parts: ModelSpec) -> None:
    base = build(parts, SPEC, seed=1)
    llava = build(parts, SPEC, seed=1)
    tuning = LoRA(r=4, alpha=6, vision=TowerLoRA(r=2, alpha=5))
    tune(llava, tuning, FAMILY, seed=1)
    randomised(llava).eval()
    beside = {name: p.detach().clone() for name, p in llava.named_parameters()}
    batch = tensors(batch_of([0, 1, 2, 3]), CPU)
    with torch.no_grad():
        want = float(LossModel(llava, SPEC)(**batch))
        merge(llava)
        assert float(LossModel(llava, SPEC)(**batch)) == pytest.approx(want, rel=1e-5)
        assert abs(float(LossModel(base, SPEC)(**batch)) - want) > 1e-2
    folded, plain = dict(llava.named_parameters()), dict(base.named_parameters())
    assert folded.keys() == plain.keys()
    for name, weight in plain.items():
        path = name.removesuffix(".weight")
        if f"{path}.lora_A.default.weight" in beside:
            down, up = (beside[f"{path}.lora_{x}.default.weight"] for x in "AB")
            scale = 5 / 2 if "vision_tower" in name else 6 / 4
            weight = weight + scale * up @ down
        torch.testing.assert_close(folded[name], weight)


def test_adapters_are_not_folded_into_rounded_weights(parts: ModelSpec) -> None:
    llava = build(parts, SPEC, seed=1)
    tune(llava, QLoRA(r=4), FAMILY, seed=1)
    with pytest.raises(AssertionError, match="q_proj is Linear4bit; adapters are folded into float weights"):
        merge(llava)


@pytest.mark.parametrize("layer", [-4, 0, 4])
def test_a_feature_layer_that_the_tower_lacks_is_named(layer: int, parts: ModelSpec) -> None:
    llava = build(parts.but(vision_feature_layer=layer), SPEC, seed=1)
    with pytest.raises(
        ValueError, match=rf"model.vision_feature_layer={layer}: the tower has 3 blocks; use -3 to -1"
    ):
        tune(llava, Projector(), FAMILY, seed=1)


def test_projector_and_tower_have_rates_of_their_own(parts: ModelSpec) -> None:
    llava = build(parts, SPEC, seed=1)
    tune(llava, LoRA(r=4, vision=TowerFull()), FAMILY, seed=1)
    optim = OptimSpec(lr=1e-4, projector_lr=2e-5, vision_lr=3e-6, weight_decay=0.1)
    groups = parameter_groups(llava, optim)
    by_id = {id(p): name for name, p in llava.named_parameters()}
    rates = {by_id[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates["model.multi_modal_projector.linear_1.weight"] == (2e-5, 0.1)
    assert rates["model.multi_modal_projector.linear_1.bias"] == (2e-5, 0.0)
    assert rates["model.vision_tower.embeddings.class_embedding"] == (3e-6, 0.0)
    assert rates["model.language_model.layers.0.mlp.up_proj.lora_B.default.weight"] == (1e-4, 0.1)
    assert len(rates) == sum(p.requires_grad for p in llava.parameters())


def finished(recipe: Recipe, *, seed: int) -> dict[str, torch.Tensor]:
    """Write a run that is done, with random trained tensors, and return them."""
    run = Place(recipe.out)
    assert recipe.model is not None
    llava = initial(recipe, SPEC)
    names = adapt(llava, recipe.tuning, FAMILY, seed=recipe.seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in llava.named_parameters() if name in names}
    made = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    write_run(run, RunManifest(recipe=recipe, processor=SPEC, shards_digest="", num_steps=3))
    with Lease(run) as lease:
        decide(run, world_size=1, driver=lease.id)
        saver = Saver(Store(run), attempt=1, rank=0, world_size=1, keep=1)
        entries = [LedgerEntry(step, 0, 1, 1, {0: ("a",)}) for step in (1, 2, 3)]
        saver.start(3, {f"param/{name}": tensor for name, tensor in made.items()}, entries)
        saver.wait()
    return made


def test_runs_build_on_runs_of_any_tuning(parts: ModelSpec, tmp_path: Path) -> None:
    first = recipe_of(parts, 0, tuning=LLM[1]).but(out=str(tmp_path / "projector"))
    second = recipe_of(parts, 0, tuning=QLoRA(r=4, alpha=8, vision=TowerLoRA(r=2, alpha=2)))
    second = second.but(out=str(tmp_path / "qlora"), init_from=first.out)
    third = recipe_of(parts, 0, tuning=LoRA(r=3, alpha=3)).but(out=str(tmp_path / "lora"), init_from=second.out)
    told = [finished(recipe, seed=number) for number, recipe in enumerate((first, second, third))]
    want = {name: p.detach() for name, p in build(parts, SPEC, seed=5).named_parameters()}
    for trained, scales in zip(told, [{}, {"llm": 2.0, "vision": 1.0}, {"llm": 1.0}], strict=True):
        for name, tensor in trained.items():
            path, _, kind = name.partition(".lora_")
            if not kind:
                want[name] = tensor
            elif kind.startswith("A"):
                scale = scales["vision" if "vision_tower" in name else "llm"]
                up = trained[f"{path}.lora_B.default.weight"]
                want[f"{path}.weight"] = want[f"{path}.weight"] + scale * up @ tensor
    llava, manifest = result(Place(str(tmp_path / "lora")))
    got = dict(llava.named_parameters())
    assert manifest.recipe == third and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_a_checkpoint_of_another_tuning_is_not_laid_over(parts: ModelSpec, tmp_path: Path) -> None:
    recipe = recipe_of(parts, 0, tuning=LoRA(r=4)).but(out=str(tmp_path / "run"))
    finished(recipe, seed=0)
    llava = build(parts, SPEC, seed=1)
    with pytest.raises(ValueError, match=r"holds model.language_model.*lora_A.* \(4, 128\), not this model's"):
        lay_over(llava, tmp_path / "run" / "checkpoints" / "step-000003")
