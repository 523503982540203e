"""Training on a small GPU: a quantised base, moments in 8 bits, blocks in host memory."""

import multiprocessing
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from micro import micro_model, outcome, random_latents, run
from processes import free_port
from safetensors.torch import load_file
from small_gpu import RUNS, one_of_two, train_one
from torch.utils.data import default_collate

from syncdpo.models.quantised import LIBRARIES, quantise
from syncdpo.training import offload
from syncdpo.training.adapter import train_adapter
from syncdpo.training.config import TrainConfig
from syncdpo.training.memory import RESIDENT
from syncdpo.training.offload import OffloadedBlocks, moved, offload_blocks
from syncdpo.training.sharding import check_shardable

BLOCKS = {"offload": "blocks", "gradient_checkpointing": True}
LEARNS = {
    "steps": 50, "learning_rate": 1e-2, "curriculum": "constant", "beta_audio": 500.0,
    "rules": "shift", "matched": 0.0, "sft_weight": 0.0, "lora_rank": 8,
}  # fmt: skip


@pytest.fixture(params=["fp8", "int8", "nf4"])
def precision(request):
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture
def bitsandbytes():
    pytest.importorskip("bitsandbytes")


def losses(outcome):
    return torch.tensor([entry["loss"] for entry in outcome[0]], dtype=torch.float64)


def margin(outcome):
    """Of the last ten steps."""
    return sum(entry["margin"] for entry in outcome[0][-10:]) / 10


def assert_same_bits(first, second):
    assert torch.equal(losses(first), losses(second))
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())


def assert_close(first, second, rtol=1e-5):
    torch.testing.assert_close(losses(first), losses(second), rtol=rtol, atol=0)
    difference = sum((tensor - second[1][name]).square().sum() for name, tensor in first[1].items())
    size = sum(tensor.square().sum() for tensor in first[1].values())
    assert (difference / size).sqrt() <= rtol


def resumed(folder, monkeypatch, **settings):
    """A run that is stopped after its checkpoint of step 7, and goes on from there."""
    from syncdpo import train as module

    save_checkpoint = module.save_checkpoint

    def stop_after_checkpoint(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", stop_after_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        run(folder, checkpoint_every=7, **settings)
    monkeypatch.undo()
    return run(folder, checkpoint_every=7, resume=True, **settings)


# --- a quantised base -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    return run(tmp_path_factory.mktemp("learnt"), **LEARNS)


def test_it_learns_as_the_full_base_does(tmp_path, learnt, precision):
    """The margin after 50 steps; and none at first, to the last bit, for both share the base."""
    found = run(tmp_path, base_precision=precision, **LEARNS)
    assert found[0][0]["margin"] == 0
    assert found[0][0]["implicit_accuracy"] == 0.5
    assert margin(found) == pytest.approx(margin(learnt), rel=0.1)
    assert margin(learnt) > 1
    assert not torch.equal(losses(found), losses(learnt))


def test_its_lora_is_the_same_file(tmp_path, learnt, precision):
    """Names and shapes; and it loads onto the full base."""
    _, weights = run(tmp_path, base_precision=precision, **LEARNS | {"steps": 2})
    shapes = ({name: tensor.shape for name, tensor in w.items()} for w in (weights, learnt[1]))
    assert next(shapes) == next(shapes)
    micro_model().load_weights(tmp_path)


def test_it_goes_on_exactly(tmp_path, monkeypatch, precision):
    settings = {"base_precision": precision, "lora_rank": 2}
    whole = run(tmp_path / "whole", **settings)
    assert_same_bits(whole, resumed(tmp_path / "stopped", monkeypatch, **settings))


def test_halves_and_checkpoints_change_nothing(tmp_path, precision):
    settings = {"base_precision": precision, "lora_rank": 2, "steps": 8}
    plain = run(tmp_path / "plain", **settings)
    assert_close(plain, run(tmp_path / "split", split_pair=True, **settings))
    assert_close(plain, run(tmp_path / "checkpoints", gradient_checkpointing=True, **settings))


def test_a_cached_reference_changes_nothing(tmp_path, precision):
    settings = {"base_precision": precision, "lora_rank": 2, "steps": 8, "beta_audio": 10.0}
    plain = run(tmp_path / "plain", draws=2, **settings)
    cached = run(tmp_path / "cached", cache_reference=2, **settings)
    torch.testing.assert_close(losses(plain), losses(cached), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reference", ["weights", "base"])
def test_it_goes_on_with_a_lora(tmp_path, precision, reference):
    """One that another base trained, loaded before the base is quantised."""
    run(tmp_path / "first", method="sft", lora_rank=2, learning_rate=1e-2)
    second = run(
        tmp_path / "second", weights=str(tmp_path / "first"), lora_rank=2, steps=2,
        base_precision=precision, learning_rate=1e-12, reference=reference,
    )  # fmt: skip
    before = outcome(tmp_path / "first")[1]
    assert (second[0][0]["margin"] == 0) == (reference == "weights")
    for name, tensor in second[1].items():
        torch.testing.assert_close(tensor, before[name])


# --- moments in 8 bits ----------------------------------------------------------------------------


def test_moments_of_8_bits_learn_as_those_of_32_do(tmp_path, bitsandbytes):
    settings = LEARNS | {"lora_rank": 128, "learning_rate": 2e-3}
    full = run(tmp_path / "full", **settings)
    small = run(tmp_path / "small", optimizer="adamw8bit", **settings)
    assert margin(small) == pytest.approx(margin(full), rel=0.1)
    assert margin(full) > 1
    assert not torch.equal(losses(small), losses(full))


def test_moments_of_8_bits_are_kept_and_go_on_exactly(tmp_path, monkeypatch, bitsandbytes):
    settings = {"optimizer": "adamw8bit", "lora_rank": 128}
    whole = run(tmp_path / "whole", **settings)
    assert_same_bits(whole, resumed(tmp_path / "stopped", monkeypatch, **settings))
    state = load_file(max((tmp_path / "whole").glob("checkpoint-*")))
    moments = {n: t for n, t in state.items() if n.endswith(("/state1", "/state2"))}
    trained = [name for name in state if name.startswith("weights/")]
    assert len(moments) == 2 * len(trained) > 0
    assert {tensor.dtype for tensor in moments.values()} == {torch.uint8}


def test_all_weights_with_moments_of_8_bits_go_on_exactly(tmp_path, monkeypatch, bitsandbytes):
    """Most of the micro model's weights have too few elements for 8 bits: both kinds are kept."""
    whole = run(tmp_path / "whole", optimizer="adamw8bit")
    assert_same_bits(whole, resumed(tmp_path / "stopped", monkeypatch, optimizer="adamw8bit"))


def test_without_bitsandbytes_its_extra_is_named(tmp_path, monkeypatch):
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"optimizer: adamw8bit needs bitsandbytes.*\[quant\]"):
        run(tmp_path, optimizer="adamw8bit")


# --- blocks in host memory ------------------------------------------------------------------------


def gradients(precision, away, watch=lambda transformer: None):
    """Of a LoRA that is not the identity, with gradient checkpointing; and the velocities."""
    model = micro_model(num_layers=5)
    transformer = model.transformer
    transformer.enable_gradient_checkpointing()
    quantise(transformer, precision)
    train_adapter(transformer, 2, model.lora_targets, lambda name: True, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    if away:
        offload_blocks(transformer, torch.device("cpu"))
    watch(transformer)
    latents = default_collate(random_latents(2))
    sigma = torch.tensor([0.3, 0.7])
    arguments = ((latents["video"], latents["audio"]), (sigma, sigma), {})
    with torch.no_grad():
        model.velocity(transformer, *arguments)  # as the reference does
    velocity = model.velocity(transformer.train(), *arguments)
    sum(stream.square().mean() for stream in velocity).backward()
    found = [p.grad for p in transformer.parameters() if p.requires_grad]
    return torch.cat([x.flatten() for x in (*found, *velocity)]).detach()


@pytest.fixture
def poisoned(monkeypatch):
    """What stays in host memory are zeros; the device gets copies of the true weights alone."""
    send_away = OffloadedBlocks._send_away
    leave = OffloadedBlocks.leave

    def send_and_poison(self, block):
        self.poison = getattr(self, "poison", [])
        true = send_away(self, block)
        self.poison.append({slot: moved(p, torch.zeros_like) for slot, p in true.items()})
        for (module, name), zeros in self.poison[-1].items():
            module._parameters[name] = zeros
        return true

    def leave_zeros(self, index, *arguments):
        leave(self, index, *arguments)
        for (module, name), zeros in self.poison[index].items():
            module._parameters[name] = zeros

    monkeypatch.setattr(OffloadedBlocks, "_send_away", send_and_poison)
    monkeypatch.setattr(OffloadedBlocks, "leave", leave_zeros)


@pytest.mark.parametrize("wanted", ["bf16", "fp8", "int8", "nf4"])
def test_gradients_are_those_of_a_base_at_home(poisoned, wanted):
    """Bit for bit, though what is not on the device is all zeros: nothing reads it there."""
    if wanted != "bf16":
        pytest.importorskip(LIBRARIES[wanted])
    home = gradients(wanted, away=False)
    assert torch.equal(gradients(wanted, away=True), home)
    assert home.abs().max() > 0


def test_zeros_would_show(poisoned, monkeypatch):
    monkeypatch.setattr(OffloadedBlocks, "enter", lambda *_: None)
    assert not torch.equal(gradients("bf16", away=True), gradients("bf16", away=False))


def test_copies_come_ahead_and_go(monkeypatch):
    """Every block but the first of a direction finds its copies made, and few are there at once."""
    fetch, enter = OffloadedBlocks._fetch, OffloadedBlocks.enter
    living, most, late, entered = [], [], [], []

    def watched_fetch(self, index):
        copies = fetch(self, index)
        for slot, weight in copies.weights.items():  # on a CPU a copy is none: make it one
            copies.weights[slot] = moved(weight, torch.clone)
        living.append([weakref.ref(weight) for weight in copies.weights.values()])
        return copies

    def watched_enter(self, index, *arguments):
        entered.append(index)
        if index not in self.ahead:
            late.append((index, offload.going_backward()))
        enter(self, index, *arguments)
        most.append(sum(any(weight() is not None for weight in block) for block in living))

    monkeypatch.setattr(OffloadedBlocks, "_fetch", watched_fetch)
    monkeypatch.setattr(OffloadedBlocks, "enter", watched_enter)
    gradients("bf16", away=True)
    forward = [0, 1, 2, 3, 4]
    assert entered == [*forward, *forward, *reversed(forward)]
    assert late == [(0, False), (0, False), (4, True)]
    assert max(most) <= RESIDENT
    assert len(living) == len(entered)  # none was made in vain


def test_what_is_trained_stays_on_the_device():
    """The meta device stands for a GPU: the base's blocks are on the host, all else is not."""
    model = micro_model(num_layers=2)
    train_adapter(model.transformer, 2, model.lora_targets, lambda name: True, seed=0)
    model.transformer.enable_gradient_checkpointing()
    offload_blocks(model.transformer, torch.device("meta"))

    def misplaced():
        return [
            name
            for name, parameter in model.transformer.named_parameters()
            if (parameter.device.type == "cpu")
            != (name.startswith("transformer_blocks") and not parameter.requires_grad)
        ]

    assert not misplaced()
    streams = (torch.empty(2, 96, 40, device="meta"), torch.empty(2, 50, 32, device="meta"))
    sigma = torch.empty(2, device="meta")
    velocity = model.velocity(model.transformer.train(), streams, (sigma, sigma), {})
    sum(stream.sum() for stream in velocity).backward()
    assert not misplaced()
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    assert all(p.grad.device == p.device == torch.device("meta") for p in trained)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wanted", ["bf16", "int8", "nf4"])
def test_gradients_on_a_gpu(wanted):
    if wanted != "bf16":
        pytest.importorskip(LIBRARIES[wanted])
    found = {}
    for away in (False, True):
        torch.manual_seed(0)
        transformer = micro_model(num_layers=5).transformer.to(torch.bfloat16)
        transformer.enable_gradient_checkpointing()
        quantise(transformer, wanted, "cuda")
        train_adapter(transformer, 2, ("to_q", "to_v"), lambda name: True, seed=0)
        if away:
            offload_blocks(transformer, torch.device("cuda"))
        else:
            transformer.to("cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        latents = default_collate(random_latents(2))
        streams = tuple(latents[name].to("cuda", torch.bfloat16) for name in ("video", "audio"))
        sigma = torch.tensor([0.3, 0.7], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            velocity = micro_model().velocity(transformer.train(), streams, (sigma, sigma), {})
        sum(stream.float().square().mean() for stream in velocity).backward()
        gradients = [p.grad.flatten() for p in transformer.parameters() if p.requires_grad]
        found[away] = torch.cat(gradients)
    assert torch.equal(found[True], found[False])


def test_a_run_with_blocks_away_is_the_same_run(tmp_path, monkeypatch):
    settings = {"lora_rank": 2, "gradient_checkpointing": True}
    home = run(tmp_path / "home", **settings)
    assert_same_bits(home, resumed(tmp_path / "away", monkeypatch, **settings | BLOCKS))


def test_a_run_may_go_on_with_its_blocks_away(tmp_path):
    """Offloading changes no step, so it may be chosen anew."""
    settings = {"lora_rank": 2, "gradient_checkpointing": True, "steps": 2}
    run(tmp_path, **settings)
    run(tmp_path, resume=True, offload="blocks", **settings)


# --- several processes, and what is refused -------------------------------------------------------


def test_two_processes_equal_one(tmp_path):
    for library in ("torchao", "bitsandbytes"):
        pytest.importorskip(library)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    context, port = multiprocessing.get_context("spawn"), free_port()
    arguments = ((rank, port, tmp_path / "two") for rank in range(2))
    children = [context.Process(target=one_of_two, args=each) for each in arguments]
    for child in children:
        child.start()
    alone = {name: train_one(name, tmp_path / "one", batch_size=4) for name in RUNS}
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0, 0]
    for name, expected in alone.items():
        assert_close(expected, outcome(tmp_path / "two" / name))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("base_precision", "nf4"), ("optimizer", "adamw8bit"), ("offload", "blocks")],
)
def test_shards_of_plain_tensors_only(setting, value):
    config = TrainConfig(lora_rank=2, gradient_checkpointing=True, **{setting: value})
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match=rf"{setting}: expected \w+ under FSDP2.*got {value}"):
        check_shardable(config, sharded)
    check_shardable(config, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    check_shardable(TrainConfig(), sharded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_precision": "int8"}, r"base_precision: expected bf16 .*lora_rank: 0\), got int8"),
        ({"offload": "blocks"}, r"offload: expected none .*lora_rank: 0\), got blocks"),
        ({"offload": "blocks", "lora_rank": 2}, "needs gradient_checkpointing: true"),
        ({"base_precision": "int4"}, "base_precision: expected bf16, fp8, int8, nf4, got 'int4'"),
        ({"optimizer": "adam"}, "optimizer: expected adamw, adamw8bit, got 'adam'"),
        ({"offload": "all"}, "offload: expected none, blocks, got 'all'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
