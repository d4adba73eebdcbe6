"""The loop: against a hand-written one, killed and resumed, and leaving everything as found."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import efface
from efface.data import LoadedRecords, order, uniforms
from efface.errors import DivergedError, TaskError
from efface.fitting import Clock, Fit, History
from efface.journal import Journal
from efface.mask import Mask
from efface.sparsify import OneShot
from efface.steps import rate
from efface.task import Settings
from efface.trained import weights_digest
from efface.unlearn import Chain, FineTune, GradientAscent, NegGradPlus, PruneFirst, RandomLabel

from . import oracles

Batches = dict[str, Any]
NewTask = Callable[..., efface.Task]


def half_mask(network: nn.Module, seed: int = 0) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    names = [n for n, p in network.named_parameters() if p.ndim > 1][:-1]
    shapes = {n: p.shape for n, p in network.named_parameters()}
    return Mask({n: torch.rand(shapes[n], generator=draw) > 0.5 for n in names})


# --- the slow twin --------------------------------------------------------------------------------


def in_double(task: efface.Task) -> efface.Task:
    """The task in float64 and without dropout."""

    def network() -> nn.Module:
        net = task.network().double()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return net

    return dataclasses.replace(task, network=network, train=(task.train[0].double(), task.train[1]))


WEIGHTS = {"retain": 1.0, "forget": -0.3}


def objective(network: nn.Module, batches: Batches, clock: Clock) -> Tensor:
    """Cross-entropy on every stream that is due, with weights; all in float64."""
    losses = [
        WEIGHTS[n] * F.cross_entropy(network(b.inputs), b.targets) for n, b in batches.items()
    ]
    return torch.stack(losses).sum()


class Twin:
    """The same fit through ``Fit`` and by hand."""

    def __init__(self, task: efface.Task, settings: Settings, streams: dict[str, efface.Stream]):
        self.task, self.settings, self.streams = in_double(task), settings, streams
        self.fit = Fit(self.task, seed=11)
        self.fast = self.fit.fresh()
        self.slow = copy.deepcopy(self.fast)

    def prepared(self, turn: int, positions: list[int], inputs: Tensor) -> Tensor:
        """Records one by one, each augmented with its own row."""
        augment = self.task.augment
        if augment is None:
            return torch.stack([inputs[p] for p in positions])
        table = uniforms(11, turn, len(inputs), augment.draws)
        rows = [augment(inputs[p : p + 1], table[p : p + 1]) for p in positions]
        return torch.cat(rows)

    def loss(self, network: nn.Module, due: dict[str, tuple[int, list[int]]], step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        inputs, targets = self.task.train
        for name, (turn, positions) in due.items():
            logits = network(self.prepared(turn, positions, inputs))
            rows = torch.stack(
                [-row.log_softmax(0)[targets[p]] for row, p in zip(logits, positions, strict=True)]
            )
            total = total + WEIGHTS[name] * rows.mean()
        return total

    def run(self, mask: Mask | None = None) -> tuple[History, list[float]]:
        s, n = self.settings, len(self.task.train[1])
        fit = self.fit
        if mask is not None:
            fit = dataclasses.replace(
                fit, subject=efface.TrainedModel(self.task, self.fast, mask=mask)
            )
            mask.apply_(dict(self.slow.named_parameters()))
        history = fit(self.fast, objective, self.streams, s)
        hand = {
            name: oracles.HandStream(
                lambda turn, name=name, stream=stream: order(
                    11, f"fit/{name}", turn, stream.positions, n
                ).tolist(),
                stream.batch_size or s.batch_size,
                stream.period,
            )
            for name, stream in self.streams.items()
        }
        first = next(iter(self.streams.values()))
        steps = s.epochs * len(
            oracles.cut(first.positions.tolist(), first.batch_size or s.batch_size)
        )
        losses = oracles.train_by_hand(
            self.slow,
            hand,
            self.loss,
            oracles.ScalarOptimizer(s.optimizer, s.momentum, s.weight_decay),
            [oracles.learning_rate(t, steps, s.lr, s.schedule, s.warmup) for t in range(steps)],
            dropped=lambda step: {n: ~t for n, t in (mask or {}).items()},
            frozen_bn=s.bn == "frozen",
        )
        return history, losses

    def check(self, history: History, losses: list[float]) -> None:
        theirs = self.slow.state_dict()
        for name, tensor in self.fast.state_dict().items():
            assert torch.allclose(tensor, theirs[name], rtol=1e-9, atol=1e-9), name
        per_epoch = len(losses) // self.settings.epochs
        for row, start in zip(history, range(0, len(losses), per_epoch), strict=True):
            mean = sum(losses[start : start + per_epoch]) / per_epoch
            assert row["loss"] == pytest.approx(mean, abs=1e-9)
            assert row["steps"] == per_epoch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
        {"schedule": "constant", "warmup": 0.5},
        {"schedule": "cosine", "warmup": 0.3},
        {"schedule": "step"},
        {"batch_size": 17},  # 120 = 7 × 17 + 1: the last batch of one joins the one before
    ],
    ids=str,
)
def test_loop_equals_hand_written_loop(task: efface.Task, changes: dict[str, Any]) -> None:
    settings = Settings(epochs=3, batch_size=32, lr=0.05, weight_decay=1e-2)
    streams = {"retain": efface.Stream(torch.arange(120))}
    twin = Twin(task, dataclasses.replace(settings, **changes), streams)
    twin.check(*twin.run())


@pytest.mark.parametrize(("period", "size"), [(1, None), (2, 7), (3, 24)])
def test_two_streams_with_periods_equal_hand_written_loop(
    task: efface.Task, split: efface.Split, period: int, size: int | None
) -> None:
    streams = {
        "retain": efface.Stream(split.retain),
        "forget": efface.Stream(split.forget, batch_size=size, period=period),
    }
    twin = Twin(task, Settings(epochs=3, batch_size=20, lr=0.05), streams)
    twin.check(*twin.run())


def test_masked_fit_equals_hand_written_loop(task: efface.Task) -> None:
    settings = Settings(epochs=3, batch_size=32, lr=0.05)
    twin = Twin(task, settings, {"retain": efface.Stream(torch.arange(120))})
    mask = half_mask(twin.fast)
    twin.check(*twin.run(mask))
    weights = dict(twin.fast.named_parameters())
    for name, keep in mask.items():
        assert (weights[name][~keep] == 0).all()
        assert (weights[name][keep] != 0).all()


@pytest.mark.parametrize("bn", ["train", "frozen"])
def test_batch_norm_and_augmentation_equal_hand_written_loop(
    conv_task: efface.Task, bn: Any
) -> None:
    settings = Settings(epochs=2, batch_size=12, lr=0.05, bn=bn)
    twin = Twin(conv_task, settings, {"retain": efface.Stream(torch.arange(0, 48, 2))})
    before = {n: b.clone() for n, b in twin.fast.named_buffers()}
    twin.check(*twin.run())
    moved = any(not torch.equal(b, before[n]) for n, b in twin.fast.named_buffers())
    assert moved == (bn == "train")


def test_recalibration_averages_over_unaugmented_records(conv_task: efface.Task) -> None:
    settings = Settings(epochs=2, batch_size=12, lr=0.05, bn="recalibrate")
    task, positions = in_double(conv_task), torch.arange(0, 48, 2)
    fit = Fit(task, seed=11)
    network = fit.fresh()
    fit(network, objective, {"retain": efface.Stream(positions)}, settings)
    seen: dict[str, list[Tensor]] = {}
    copied = copy.deepcopy(network).train()
    norms = {n: m for n, m in copied.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, module in norms.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    for batch in oracles.cut(positions.tolist(), 12):
        copied(torch.stack([task.train[0][p] for p in batch]))
    for name, inputs in seen.items():
        module = network.get_submodule(name)
        for channel in range(inputs[0].shape[1]):
            values = [x[:, channel].flatten().tolist() for x in inputs]
            means = [sum(v) / len(v) for v in values]
            spread = [
                sum((x - m) ** 2 for x in v) / (len(v) - 1)
                for v, m in zip(values, means, strict=True)
            ]
            assert float(module.running_mean[channel]) == pytest.approx(sum(means) / len(means))
            assert float(module.running_var[channel]) == pytest.approx(sum(spread) / len(spread))


@given(
    st.sampled_from(["constant", "linear", "cosine", "step"]),
    st.floats(0, 1),
    st.integers(1, 60),
)
def test_rate_equals_its_definition(schedule: Any, warmup: float, steps: int) -> None:
    settings = Settings(lr=1.0, schedule=schedule, warmup=warmup)
    for step in range(steps):
        wanted = oracles.learning_rate(step, steps, 1.0, schedule, warmup)
        if abs(step - warmup * steps) < 1e-9:
            continue  # either side of the corner
        assert rate(settings, step / steps, steps) == pytest.approx(wanted, abs=1e-12)
        assert 0 < rate(settings, step / steps, steps) <= 1


def test_descend_weighs_streams(task: efface.Task, split: efface.Split, fit: Fit) -> None:
    network = fit.fresh()
    seen: list[float] = []

    def objective(net: nn.Module, batches: Batches, clock: Clock) -> Tensor:
        value = fit.descend(net, batches, clock)
        with torch.no_grad():
            parts = {n: F.cross_entropy(net(b.inputs), b.targets) for n, b in batches.items()}
            seen.append(float(value - (parts["retain"] + 0.25 * parts["forget"])))
        return value

    streams = {
        "retain": efface.Stream(split.retain),
        "forget": efface.Stream(split.forget, weight=0.25),
    }
    fit(network, objective, streams, Settings(epochs=1, batch_size=32))
    assert seen == pytest.approx([0.0] * len(seen), abs=1e-6)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_an_epoch_is_one_pass_over_the_first_stream(fit: Fit, period: int) -> None:
    visits: dict[int, list[int]] = {}

    def objective(network: nn.Module, batches: Batches, clock: Clock) -> Tensor:
        if "a" in batches:
            visits.setdefault(clock.epoch, []).extend(batches["a"].positions.tolist())
        return fit.descend(network, batches, clock)

    streams = {
        "a": efface.Stream(torch.arange(40), batch_size=8, period=period),
        "b": efface.Stream(torch.arange(40, 50)),
    }
    fit(fit.fresh(), objective, streams, Settings(epochs=2))
    assert {e: sorted(seen) for e, seen in visits.items()} == {e: list(range(40)) for e in range(2)}


def test_relabelled_stream_is_trained_on_the_given_labels(task: efface.Task, fit: Fit) -> None:
    labels = (task.records.targets + 1) % 3
    wrong: list[bool] = []

    def objective(network: nn.Module, batches: Batches, clock: Clock) -> Tensor:
        batch = batches["all"]
        wrong.append(bool((batch.targets == labels[batch.positions]).all()))
        return fit.descend(network, batches, clock)

    stream = efface.Stream(torch.arange(120), targets=labels)
    fit(fit.fresh(), objective, {"all": stream}, Settings(epochs=1))
    assert all(wrong)


def test_a_stream_without_records_is_refused() -> None:
    with pytest.raises(TaskError, match="without records"):
        efface.Stream(torch.tensor([], dtype=torch.long))


# --- loader path ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_loader_path_gives_the_bytes_of_the_tensor_path(
    task: efface.Task, conv_task: efface.Task, conv: bool
) -> None:
    chosen = conv_task if conv else task
    dataset = torch.utils.data.TensorDataset(*chosen.train)
    loaded = dataclasses.replace(chosen, train=LoadedRecords(dataset))
    assert not loaded.records.in_memory
    assert efface.train(loaded, seed=2).digest == efface.train(chosen, seed=2).digest


# --- killed and resumed ---------------------------------------------------------------------------


class KilledError(Exception):
    """The end of a process, as a test can have it."""


class Killer:
    """A progress callback that raises at the n-th step of the command."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, label: str, step: int, steps: int) -> None:
        self.count += 1
        if self.count == self.at:
            raise KilledError


Command = Callable[[Any, Any], efface.TrainedModel]


def outcome(model: efface.TrainedModel) -> dict[str, Any]:
    """Everything of a model but what it cost."""
    return {
        "weights": model.digest,
        "mask": model.mask and model.mask.digest,
        "rewind": model.rewind and weights_digest(model.rewind),
        "fits": [step.detail["fits"] for step in model.lineage],
        "images": [step.detail["images"] for step in model.lineage],
        "forgotten": model.forgotten,
        "modes": [m.training for m in model.network.modules()],
    }


def check_resume(
    command: Command, folder: Path, kills: list[int], seconds: float = 0.0
) -> efface.TrainedModel:
    """Run through; run again with kills; run to the end: the same."""
    whole = command(None, None)
    for kill in kills:
        with pytest.raises(KilledError):
            command(Journal(folder, {"test": 1}, seconds=seconds), Killer(kill))
    journal = Journal(folder, {"test": 1}, seconds=seconds)
    assert journal.start() or seconds > 0
    torch.rand(3)  # the global state is not part of a run
    assert outcome(command(journal, None)) == outcome(whole)
    return whole


@hypothesis_settings(max_examples=6, deadline=None)
@given(
    kills=st.lists(st.integers(2, 15), min_size=1, max_size=3),
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    bn=st.sampled_from(["train", "frozen", "recalibrate"]),
)
def test_training_resumes_byte_for_byte(
    new_conv_task: NewTask, tmp_path_factory: Any, kills: list[int], optimizer: Any, bn: Any
) -> None:
    settings = Settings(
        epochs=4, batch_size=12, lr=0.01, optimizer=optimizer, bn=bn, warmup=0.2, schedule="cosine"
    )
    task = new_conv_task(fit=settings)
    steps = [k for i, k in enumerate(kills) if sum(kills[:i]) + k - i < 16]  # each resumes the last

    def command(journal: Any, progress: Any) -> efface.TrainedModel:
        return efface.train(task, seed=4, rewind=2, journal=journal, progress=progress)

    check_resume(command, tmp_path_factory.mktemp("journal") / "j", steps)


@pytest.mark.parametrize("method", ["two-stream", "chain", "prune-first", "random-label"])
@pytest.mark.parametrize("kill", [3, 9, 17])
def test_methods_resume_byte_for_byte(
    trained: efface.TrainedModel, split: efface.Split, tmp_path: Path, method: str, kill: int
) -> None:
    methods: dict[str, Any] = {
        "two-stream": NegGradPlus(epochs=4, lr=0.02, cap=2.0),
        "chain": Chain(GradientAscent(epochs=4, lr=0.01), FineTune(epochs=3, lr=0.05)),
        "prune-first": PruneFirst(OneShot(sparsity=0.5, recovery=2), FineTune(epochs=2)),
        "random-label": RandomLabel(epochs=3),
    }

    def command(journal: Any, progress: Any) -> efface.TrainedModel:
        chosen = methods[method]
        return efface.forget(trained, split, chosen, seed=1, journal=journal, progress=progress)

    check_resume(command, tmp_path / "j", [kill, 2])


@pytest.mark.parametrize("like", ["dense", "same-mask", "repruned"])
def test_retraining_resumes_byte_for_byte(
    pruned: efface.TrainedModel, split: efface.Split, tmp_path: Path, like: Any
) -> None:
    def command(journal: Any, progress: Any) -> efface.TrainedModel:
        return efface.retrain(
            pruned.task, split, model=pruned, like=like, journal=journal, progress=progress
        )

    total = 36 + (6 if like == "repruned" else 0)
    check_resume(command, tmp_path / "j", [15, total - 16])


def test_kill_before_the_first_commit_starts_anew(task: efface.Task, tmp_path: Path) -> None:
    def command(journal: Any, progress: Any) -> efface.TrainedModel:
        return efface.train(task, seed=0, journal=journal, progress=progress)

    check_resume(command, tmp_path / "j", [1, 20], seconds=1000.0)


def test_a_damaged_commit_is_not_used(task: efface.Task, tmp_path: Path) -> None:
    folder = tmp_path / "j"
    with pytest.raises(KilledError):
        efface.train(task, seed=0, journal=Journal(folder, {}, 0.0), progress=Killer(20))
    (path,) = folder.glob("fit-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    again = efface.train(task, seed=0, journal=Journal(folder, {}, 0.0))
    assert again.digest == efface.train(task, seed=0).digest


def test_a_journal_of_another_command_is_kept_until_the_first_commit(
    task: efface.Task, tmp_path: Path
) -> None:
    folder = tmp_path / "j"
    with pytest.raises(KilledError):
        efface.train(task, seed=0, journal=Journal(folder, {"a": 1}, 0.0), progress=Killer(20))
    other = Journal(folder, {"a": 2}, 0.0)
    assert not other.start()
    assert other.read(0) is None
    assert Journal(folder, {"a": 1}).start()
    assert efface.train(task, seed=0, journal=other).digest == efface.train(task, seed=0).digest
    assert not Journal(folder, {"a": 1}).start()
    assert Journal(folder, {"a": 2}).start()


MASKS: dict[str, Callable[[nn.Module], Mask | None]] = {
    "other": lambda network: half_mask(network, seed=8),
    "none": lambda network: None,
}


@pytest.mark.parametrize("change", MASKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_after_a_hook_changed_the_mask(
    task: efface.Task, tmp_path: Path, change: str, optimizer: Any
) -> None:
    """Un-pruning and gradual pruning in mid-fit are no special cases."""
    settings = Settings(epochs=4, batch_size=24, lr=0.02, optimizer=optimizer)

    def run(journal: Journal | None, kill: int | None) -> tuple[Any, ...]:
        network = Fit(task, seed=1).fresh()
        model = efface.TrainedModel(task, network, mask=half_mask(network))

        def hook(net: nn.Module, clock: Clock, history: History) -> None:
            if clock.epoch == 1:
                model.set_mask(MASKS[change](net))

        fit = Fit(task, 1, subject=model, journal=journal, progress=(kill and Killer(kill)) or None)
        history = fit.with_(hook=hook)(
            network, fit.descend, {"retain": efface.Stream(torch.arange(120))}, settings
        )
        return model.digest, model.mask, history

    whole = run(None, None)
    for kill in (6, 10, 11, 12, 17):  # the hook runs after step 10
        folder = tmp_path / str(kill)
        with pytest.raises(KilledError):
            run(Journal(folder, {}, 0.0), kill)
        assert run(Journal(folder, {}, 0.0), None) == whole, kill


def test_recalibration_repeats_after_resume_with_dropout_before_batch_norm(
    new_conv_task: NewTask, tmp_path: Path
) -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Dropout(0.3), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3)
        )

    settings = Settings(epochs=2, batch_size=12, lr=0.01, bn="recalibrate")
    task = new_conv_task(network=network, fit=settings)

    def command(journal: Any, progress: Any) -> efface.TrainedModel:
        model = efface.train(task, seed=4, journal=journal, progress=progress)
        return efface.prune(model, OneShot(0.5, scope="all", recovery=0))

    whole = command(None, None)
    journal = Journal(tmp_path / "j", {}, 0.0)
    assert command(journal, None).digest == whole.digest
    torch.manual_seed(12345)
    assert command(Journal(tmp_path / "j", {}, 0.0), None).digest == whole.digest


# --- everything is left as found ------------------------------------------------------------------


def run_little(fit: Fit, network: nn.Module, **changes: Any) -> History:
    settings = Settings(epochs=2, batch_size=12, lr=0.01, **changes)
    return fit(network, fit.descend, {"retain": efface.Stream(torch.arange(48))}, settings)


@pytest.mark.parametrize("bn", ["train", "frozen", "recalibrate"])
@pytest.mark.parametrize("fails", [False, True])
def test_state_is_left_as_found(conv_task: efface.Task, bn: Any, fails: bool) -> None:
    network = conv_task.network()
    network.train()
    network[1].eval()
    frozen = network[4].weight.requires_grad_(False)
    kept = frozen.detach().clone()
    modes = [m.training for m in network.modules()]
    momenta = [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    grads = [p.requires_grad for p in network.parameters()]
    torch.manual_seed(77)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    fit = Fit(conv_task, seed=0, progress=Killer(3 if fails else -1))
    if fails:
        with pytest.raises(KilledError):
            run_little(fit, network, bn=bn)
    else:
        run_little(fit, network, bn=bn)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == grads
    assert [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert torch.equal(frozen, kept)
    assert all(p.grad is None and p.is_contiguous() for p in network.parameters())


def test_the_global_state_does_not_matter(conv_task: efface.Task) -> None:
    digests = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        digests.add(efface.train(conv_task, seed=3).digest)
    assert len(digests) == 1
    assert efface.train(conv_task, seed=4).digest not in digests


def test_no_epochs_change_nothing(conv_task: efface.Task) -> None:
    fit = Fit(conv_task)
    for bn in ("train", "recalibrate"):
        network = fit.fresh()
        before = weights_digest(network.state_dict())
        settings = Settings(epochs=0, bn=bn)
        assert fit(network, fit.descend, {"a": efface.Stream(torch.arange(48))}, settings) == []
        assert weights_digest(network.state_dict()) == before


def test_teacher_shares_nothing(conv_task: efface.Task, conv_trained: efface.TrainedModel) -> None:
    modes = [m.training for m in conv_trained.network.modules()]
    teacher = Fit(conv_task).teacher(conv_trained)
    own = {t.data_ptr() for t in conv_trained.network.state_dict().values()}
    assert not own & {t.data_ptr() for t in teacher.state_dict().values()}
    assert weights_digest(teacher.state_dict()) == conv_trained.digest
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert all(p.requires_grad for p in conv_trained.network.parameters())
    assert [m.training for m in conv_trained.network.modules()] == modes


def test_fresh_networks_depend_on_the_seed_alone(task: efface.Task) -> None:
    torch.manual_seed(0)
    first = weights_digest(Fit(task, 1).fresh().state_dict())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert weights_digest(Fit(task, 1).fresh().state_dict()) == first
    assert weights_digest(Fit(task, 2).fresh().state_dict()) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_is_an_immutable_value(fit: Fit) -> None:
    more = fit.with_(hook=lambda *_: None)
    assert (len(fit.hooks), len(more.hooks)) == (0, 1)
    assert fit.at("inner").path == "fit/inner"
    assert fit.path == "fit"
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.seed = 3  # type: ignore[misc]
    first = torch.rand(3, generator=fit.generator("x"))
    assert torch.equal(first, torch.rand(3, generator=fit.generator("x")))
    assert not torch.equal(first, torch.rand(3, generator=fit.at("inner").generator("x")))


# --- what always holds ----------------------------------------------------------------------------


def test_divergence_names_epoch_and_step(fit: Fit) -> None:
    def objective(network: nn.Module, batches: Batches, clock: Clock) -> Tensor:
        return fit.descend(network, batches, clock) * (float("nan") if clock.step == 11 else 1.0)

    network = fit.fresh()
    with pytest.raises(DivergedError, match=r"epoch 2, step 12 \(climbing\)"):
        fit(
            network,
            objective,
            {"retain": efface.Stream(torch.arange(120))},
            Settings(epochs=3, batch_size=16),
            label="climbing",
        )
    assert all(torch.isfinite(p).all() for p in network.parameters())


class Recorder:
    """A constraint that notes when it runs and what it sees."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.old: dict[str, Tensor] = {}

    def begin(self, params: Any) -> None:
        assert all(p.grad is not None for p in params.values())
        self.old = {n: p.detach().clone() for n, p in params.items()}
        self.log.append(f"{self.name} begins")

    def end(self, params: Any) -> None:
        assert any(not torch.equal(p, self.old[n]) for n, p in params.items())
        self.log.append(f"{self.name} ends")


def test_constraints_run_in_order_around_every_step(fit: Fit) -> None:
    log: list[str] = []
    bound = fit.with_(Recorder("a", log)).with_(Recorder("b", log))
    settings = Settings(epochs=2, batch_size=60)
    bound(bound.fresh(), bound.descend, {"retain": efface.Stream(torch.arange(120))}, settings)
    assert log == ["a begins", "b begins", "a ends", "b ends"] * 4


class Restore:
    """Partial updates: what was not selected keeps its old value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def begin(self, params: Any) -> None:
        self.old = params[self.name].detach().clone()

    def end(self, params: Any) -> None:
        params[self.name].data.copy_(self.old)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_restored_weights_do_not_move(fit: Fit, optimizer: Any) -> None:
    bound = fit.with_(Restore("2.weight"))
    network = fit.fresh()
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    settings = Settings(epochs=3, batch_size=30, lr=0.05, optimizer=optimizer)
    bound(network, bound.descend, {"retain": efface.Stream(torch.arange(120))}, settings)
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - {"2.weight"}


class Zeros:
    """Checks pruned weights after every step: it cannot see them after the mask, so before one."""

    def __init__(self, model: efface.TrainedModel) -> None:
        self.model, self.steps = model, 0

    def begin(self, params: Any) -> None:
        assert self.model.mask is not None
        for name, keep in self.model.mask.items():
            gone = params[name][~keep]
            assert (gone == 0).all()
            assert not torch.signbit(gone).any()
        self.steps += 1

    def end(self, params: Any) -> None:
        name = next(iter(self.model.mask or ()))
        assert params[name][~self.model.mask[name]].abs().max() > 0  # type: ignore[index]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_pruned_weights_are_plus_zero_at_every_step(task: efface.Task, optimizer: Any) -> None:
    network = Fit(task).fresh()
    model = efface.TrainedModel(task, network, mask=half_mask(network))
    checker = Zeros(model)
    fit = Fit(task, subject=model).with_(checker)

    def objective(net: nn.Module, batches: Batches, clock: Clock) -> Tensor:
        # huge but finite gradients on pruned weights
        assert model.mask is not None
        weights = dict(net.named_parameters())
        kicked = [(weights[n] * (~keep) * 1e18).sum() for n, keep in model.mask.items()]
        return fit.descend(net, batches, clock) + torch.stack(kicked).sum()

    settings = Settings(epochs=2, batch_size=24, lr=0.05, momentum=0.99, optimizer=optimizer)
    fit(network, objective, {"retain": efface.Stream(torch.arange(120))}, settings)
    assert checker.steps == 10
    checker.begin(dict(network.named_parameters()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_regrown_weights_start_without_momentum(task: efface.Task, optimizer: Any) -> None:
    """The optimiser's state is cleared where the mask changes, before the next step."""
    network = Fit(task).fresh()
    mask = half_mask(network)
    model = efface.TrainedModel(task, network, mask=mask)
    lr, after = 0.01, 5
    moved: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    class Watch:
        def begin(self, params: Any) -> None:
            self.old = {n: params[n].detach().clone() for n in mask}
            self.gradients = {n: params[n].grad.clone() for n in mask}

        def end(self, params: Any) -> None:
            if model.mask is None and not moved:
                moved.update({n: params[n].detach() - self.old[n] for n in mask})
                gradients.update(self.gradients)

    def hook(net: nn.Module, clock: Clock, history: History) -> None:
        if clock.epoch == 0:
            model.set_mask(None)

    fit = Fit(task, subject=model).with_(Watch(), hook)
    settings = Settings(
        epochs=2, batch_size=24, lr=lr, schedule="constant", weight_decay=0.0, optimizer=optimizer
    )
    fit(network, fit.descend, {"retain": efface.Stream(torch.arange(120))}, settings)
    for name, keep in mask.items():
        found, g = moved[name][~keep], gradients[name][~keep]
        if optimizer == "sgd":
            wanted = -lr * (g + 0.9 * g)  # the first step of Nesterov momentum
        else:
            t = after + 1  # moments are gone, Adam's step count is the tensor's
            first, second = 0.1 * g / (1 - 0.9**t), 0.001 * g * g / (1 - 0.999**t)
            wanted = -lr * first / (second.sqrt() + 1e-8)
        assert torch.allclose(found, wanted, atol=1e-6), name


def test_counting(task: efface.Task, split: efface.Split) -> None:
    fit = Fit(task)
    streams = {
        "retain": efface.Stream(split.retain),
        "forget": efface.Stream(split.forget, batch_size=8, period=2),
    }
    fit(fit.fresh(), fit.descend, streams, Settings(epochs=2, batch_size=16))
    assert fit.meter.images == {"retain": 2 * 96, "forget": 6 * 8}
    assert fit.meter.calls == 1


def test_progress_counts_every_step(task: efface.Task) -> None:
    calls: list[tuple[str, int, int]] = []
    fit = Fit(task, progress=lambda *args: calls.append(args))
    settings = Settings(epochs=2, batch_size=40)
    fit(fit.fresh(), fit.descend, {"a": efface.Stream(torch.arange(120))}, settings, label="x")
    assert calls == [("x", i, 6) for i in range(1, 7)]


def test_a_stream_of_one_record_leaves_batch_norm_alone(conv_task: efface.Task) -> None:
    """One record has no variance; a request for one record is the usual one."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 3
    task = efface.Task(lambda: copy.deepcopy(flat), (x, y), (x, y), fit=efface.Settings(epochs=1))
    trained = efface.train(task)
    split = efface.Split.by_ids(task, [3])
    for name in ("neggrad-plus", "scrub", "sfron", "salun", "gradient-ascent"):
        after = efface.forget(trained, split, name)
        assert all(bool(torch.isfinite(t).all()) for t in after.network.state_dict().values())
