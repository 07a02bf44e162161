"""The experiment folder: crashes, full disks, two processes at once, settings and metrics that lie."""

import os
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from children import exit_status, fork, kill
from folders import (
    KILLS,
    SETTINGS,
    a_folder_of_everything,
    a_state,
    files,
    loaded,
    loads_or_refuses,
    mutate,
    mutations,
    names,
    new_experiment,
    quiet,
    refused,
    same,
    unprivileged,
)
from hypothesis import given
from hypothesis import strategies as st

from experiment.checkpoint import load_checkpoint, save_checkpoint
from experiment.folder import Experiment
from storage.files import write_json

NASTY = [
    b"!!python/object/apply:os.system [true]",
    b"!!int ''",
    b"!!timestamp x",
    b"2001-99-99",
    b"&a ",
    b"*a ",
    b"<<: ",
]
NASTY += [
    b"? ",
    b"- ",
    b"{",
    b"[[[[",
    b": ",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"%YAML 9.9\n---\n",
    b"!!binary =",
    b"\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_folder_of_everything(tmp_path_factory.mktemp("mutated"))


@mutations
@given(data=st.data())
def test_mutated_settings_are_refused_or_plain(folder: Path, data: st.DataObject) -> None:
    path = folder / "args.yaml"
    path.write_bytes(mutate(data, (folder / "good.yaml").read_bytes(), NASTY))
    opened = loads_or_refuses(path, lambda: Experiment.open(folder).settings)
    for key, value in (opened or {}).items():
        assert type(key) is str
        for item in value if type(value) is list else [value]:
            assert type(item) in (type(None), bool, int, float, str)


@mutations
@given(data=st.data())
def test_mutated_metrics_are_refused_or_rows(folder: Path, data: st.DataObject) -> None:
    (folder / "args.yaml").write_bytes((folder / "good.yaml").read_bytes())
    path = folder / "metrics.csv"
    path.write_bytes(mutate(data, (folder / "good.csv").read_bytes(), [b'"', b",", b"\r", b"\0", b"\xff"]))
    rows = loads_or_refuses(path, lambda: Experiment.open(folder).read_metrics())
    if rows is not None:
        with Experiment.open(folder, lock="train", echo=quiet) as run:
            run.append_metrics({"epoch": 3})
            assert len(run.read_metrics()) == len(rows) + 1


def test_the_settings_come_back_as_they_went(tmp_path: Path) -> None:
    with Experiment.create(tmp_path / "deep" / "er", "run", {**SETTINGS, "eps": (2, 4)}) as run:
        assert run.folder == tmp_path / "deep" / "er" / "run"
        assert run.settings == SETTINGS
    assert Experiment.open(run.folder).settings == SETTINGS
    assert yaml.safe_load((run.folder / "args.yaml").read_text()) == SETTINGS


def test_settings_are_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        with refused("'epochs' holds a dict", run.folder / "args.yaml"):
            run.update_settings({**SETTINGS, "epochs": {}})
        assert run.settings == Experiment.open(run.folder).settings == SETTINGS
        run.update_settings({**SETTINGS, "epochs": 5})
        assert run.settings == Experiment.open(run.folder).settings == {**SETTINGS, "epochs": 5}


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@mutations
@given(values=st.dictionaries(st.text(), scalars | st.lists(scalars, max_size=3), max_size=4))
def test_any_plain_settings_come_back_as_they_went(values: dict) -> None:
    with tempfile.TemporaryDirectory() as root, Experiment.create(root, "run", values) as run:
        read = Experiment.open(run.folder).settings
        assert read == values
        assert same(read, values)


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")
    (tmp_path / "run-2").write_text("a file of that name")
    with refused("exists and is not overwritten", tmp_path / "run"):
        Experiment.create(tmp_path, "run", SETTINGS, exist="error")
    with new_experiment(tmp_path) as third, new_experiment(tmp_path) as fourth:
        assert [third.folder.name, fourth.folder.name] == ["run-3", "run-4"]
    assert names(tmp_path / "run") == ["precious"]
    assert (tmp_path / "run-2").read_text() == "a file of that name"


def test_processes_that_create_the_same_name_get_a_folder_each(tmp_path: Path) -> None:
    start_read, start_write = os.pipe()

    def create() -> None:
        os.close(start_write)
        os.read(start_read, 1)  # All wait here until the parent closes its end.
        for _ in range(10):
            new_experiment(tmp_path)

    children = [fork(create) for _ in range(6)]
    os.close(start_write)
    assert [exit_status(child) for child in children] == [0] * 6
    assert names(tmp_path) == sorted(["run", *(f"run-{number}" for number in range(2, 61))])
    assert all(Experiment.open(folder).settings == SETTINGS for folder in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b", "x" * 300])
def test_impossible_names_are_refused(tmp_path: Path, name: str) -> None:
    with refused("cannot be the name|File name too long"):
        Experiment.create(tmp_path, name, SETTINGS)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "bad", [{"a": {"b": 1}}, {"a": [[1]]}, {"a": Path("x")}, {1: 2}, {"a": np.float64(1)}, {"a": torch.ones(1)}, [1]]
)
def test_settings_that_are_not_plain_are_refused_before_a_folder_is_made(tmp_path: Path, bad: Any) -> None:
    with refused("accepted are|must be", tmp_path / "run" / "args.yaml"):
        Experiment.create(tmp_path, "run", bad)
    assert names(tmp_path) == []


def test_a_place_that_cannot_hold_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused("cannot create .*: File exists", tmp_path / "file"):
        Experiment.create(tmp_path / "file", "run", SETTINGS)
    with refused("exist='ask': accepted are 'rename', 'error' and 'adopt'"):
        Experiment.create(tmp_path, "run", SETTINGS, exist="ask")


BAD_YAML = {
    "nothing": ("", "must be a mapping of settings, is NoneType"),
    "a list": ("- 1", "must be a mapping of settings, is list"),
    "a text": ("hello", "is str"),
    "broken": ("a: [1", "not plain YAML"),
    "tabs": ("a:\n\t- 1", "not plain YAML"),
    "two documents": ("a: 1\n---\nb: 2", "not plain YAML"),
    "code": ("a: !!python/object/apply:os.system ['touch {marker}']", "not plain YAML .*python/object"),
    "a name": ("a: !!python/name:os.system", "not plain YAML"),
    "a date": ("a: 2024-01-01", "'a' holds a date; accepted are null, true"),
    "an impossible date": ("a: 2024-13-41", "not plain YAML"),
    "a number as a name": ("1: a", "must be text, not '1'"),
    "nested": ("a: {b: 1}", "'a' holds a dict"),
    "aliases": ("a: &a [x, x]\nb: *a", "aliases are not accepted"),
    "merges": ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "aliases are not accepted"),
    "depth": ("a: " + "[" * 50_000, "not plain YAML"),
    "length": ("# " + "x" * 100_000, "longer than 100000 bytes"),
    "latin-1": ("name: \xe9".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize(("content", "pattern"), BAD_YAML.values(), ids=BAD_YAML.keys())
def test_settings_that_lie_are_refused(tmp_path: Path, content: str | bytes, pattern: str) -> None:
    path, marker = tmp_path / "args.yaml", tmp_path / "was-run"
    path.write_bytes(content if isinstance(content, bytes) else content.replace("{marker}", str(marker)).encode())
    with refused(pattern, path):
        Experiment.open(tmp_path)
    assert not marker.exists()
    assert names(tmp_path) == ["args.yaml"]


def test_what_is_no_experiment_folder_is_named(tmp_path: Path) -> None:
    with refused("no such experiment folder", tmp_path / "gone"):
        Experiment.open(tmp_path / "gone")
    with refused("not an experiment folder .no args.yaml", tmp_path):
        Experiment.open(tmp_path)
    (tmp_path / "args.yaml").mkdir()
    with refused("not a regular file", tmp_path / "args.yaml"):
        Experiment.open(tmp_path)


def hold(folder: Path, also: Callable[[], Any] = lambda: None) -> int:
    """A child that holds the training lock until it is killed; returns once it does."""
    ready_read, ready_write = os.pipe()

    def body() -> None:
        held = Experiment.open(folder, lock="train", echo=quiet)
        also()
        os.write(ready_write, b"x")
        time.sleep(60)
        held.close()

    child = fork(body)
    os.close(ready_write)
    assert os.read(ready_read, 1) == b"x"
    os.close(ready_read)
    return child


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    child = hold(tmp_path / "run")
    with refused(f"in use: process {child} on .* has it for train", tmp_path / "run"):
        Experiment.open(tmp_path / "run", lock="train")
    Experiment.open(tmp_path / "run").read_metrics()
    Experiment.open(tmp_path / "run", lock="eval").close()
    kill(child)
    with Experiment.open(tmp_path / "run", lock="train", echo=quiet) as run:
        run.log("mine")


def test_an_orphan_of_a_dead_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    life_read, life_write = os.pipe()  # Reads as ended once every process that has the other end is gone.

    def orphan() -> None:
        os.read(life_read, 1)

    def leave_one() -> None:
        os.close(life_write)
        fork(orphan)

    child = hold(tmp_path / "run", leave_one)
    kill(child)
    Experiment.open(tmp_path / "run", lock="train").close()
    os.close(life_write)


def test_the_lock_excludes_within_a_process_and_is_given_back(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run, refused(f"in use: process {os.getpid()}", run.folder):
        Experiment.open(run.folder, lock="train")
    with Experiment.open(run.folder, lock="eval"), refused("has it for eval", run.folder):
        Experiment.open(run.folder, lock="eval")
    Experiment.open(run.folder, lock="train").close()


def test_nothing_is_written_without_the_lock(tmp_path: Path) -> None:
    run = new_experiment(tmp_path)
    run.close()
    before = files(run.folder)
    with Experiment.open(run.folder, lock="eval", echo=quiet) as evaluating:
        for reader in (run, Experiment.open(run.folder), evaluating):
            for write in (
                lambda: reader.save_latest({}),  # noqa: B023
                lambda: reader.save_best({}),  # noqa: B023
                lambda: reader.update_settings(SETTINGS),  # noqa: B023
                lambda: reader.append_metrics({"epoch": 1}),  # noqa: B023
                lambda: reader.truncate_metrics(0),  # noqa: B023
            ):
                with refused("is not open with the lock", error=RuntimeError):
                    write()
    assert {name: data for name, data in files(run.folder).items() if name != ".lock-eval"} == before


def test_abandoned_halves_are_cleared_by_the_run_that_alone_can_write_them(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    folder = tmp_path / "run"
    for name in ("latest.pt", "epoch_0010.pt", "metrics.csv", "args.yaml", "autoattack.json"):
        (folder / f".{name}.0123456789abcdef.tmp").write_text("half")
    Experiment.open(folder)
    assert len(list(folder.glob(".*.tmp"))) == 5
    Experiment.open(folder, lock="train").close()
    assert [path.name for path in folder.glob(".*.tmp")] == [".autoattack.json.0123456789abcdef.tmp"]
    Experiment.open(folder, lock="eval").close()
    assert names(folder) == [".lock", ".lock-eval", "args.yaml"]


def test_a_folder_without_write_permission_is_refused_and_left_alone() -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        with new_experiment(Path(root)) as run:
            run.save_latest(a_state(1))
        (run.folder / ".lock").unlink()
        os.chmod(run.folder, 0o555)
        before = files(run.folder)
        try:
            with unprivileged():
                assert Experiment.open(run.folder).load_latest().state["epoch"] == 1
                with refused("cannot lock .*Permission denied", run.folder / ".lock"):
                    Experiment.open(run.folder, lock="train")
                with refused("cannot write .*Permission denied", run.folder / "latest.pt"):
                    save_checkpoint(run.folder / "latest.pt", a_state(2))
        finally:
            os.chmod(run.folder, 0o755)
        assert files(run.folder) == before


def test_a_permission_lost_on_the_way_leaves_the_last_good_files() -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        with new_experiment(Path(root)) as run:
            run.save_latest(a_state(1))
            run.append_metrics({"epoch": 1})
            before = files(run.folder)
            os.chmod(run.folder, 0o555)
            try:
                with unprivileged():
                    for write in (lambda: run.save_latest(a_state(2)), lambda: run.append_metrics({"epoch": 2})):
                        with refused("cannot write .*Permission denied"):
                            write()
            finally:
                os.chmod(run.folder, 0o755)
            assert files(run.folder) == before
            run.save_latest(a_state(2))
            assert run.load_latest().state["epoch"] == 2


def test_latest_and_the_generation_before(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        assert run.load_latest() is None
        for epoch in (1, 2, 3):
            run.save_latest(a_state(epoch))
        run.save_best(a_state(2))
        run.save_named("epoch_0001", a_state(1))
    read = Experiment.open(run.folder).load_latest()
    assert same(read.state, loaded(a_state(3)))
    assert (read.path, read.note) == (run.folder / "latest.pt", "")
    for name, epoch in {"previous": 2, "best": 2, "epoch_0001": 1}.items():
        assert load_checkpoint(run.folder / f"{name}.pt")["epoch"] == epoch
    assert names(run.folder) == [".lock", "args.yaml", "best.pt", "epoch_0001.pt", "latest.pt", "previous.pt"]


@pytest.mark.parametrize("how", ["truncated", "missing", "text"])
def test_where_latest_is_damaged_previous_serves_and_is_kept(tmp_path: Path, how: str) -> None:
    with new_experiment(tmp_path) as run:
        run.save_latest(a_state(1))
        run.save_latest(a_state(2))
    latest = run.folder / "latest.pt"
    content = {"truncated": latest.read_bytes()[:-100], "text": b"hello", "missing": None}[how]
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    with Experiment.open(run.folder, lock="train") as run:
        read = run.load_latest()
        assert read.state["epoch"] == 1
        assert read.path == run.folder / "previous.pt"
        assert str(latest) in read.note
        assert ("No such file" if how == "missing" else "checkpoint") in read.note
        assert "\n" not in read.note
        assert content is None or latest.read_bytes() == content
        run.save_latest(a_state(5))
        assert load_checkpoint(latest)["epoch"] == 5
        assert load_checkpoint(run.folder / "previous.pt")["epoch"] == 1, "a damaged file took a good one's place"
        run.save_latest(a_state(6))
        assert load_checkpoint(run.folder / "previous.pt")["epoch"] == 5


def test_a_latest_that_someone_removed_does_not_stop_the_run(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        for epoch in (1, 2):
            run.save_latest(a_state(epoch))
        (run.folder / "latest.pt").unlink()
        run.save_latest(a_state(3))
        assert [load_checkpoint(run.folder / name)["epoch"] for name in ("previous.pt", "latest.pt")] == [1, 3]


def test_where_both_are_damaged_both_are_named(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        run.save_latest(a_state(1))
        (run.folder / "latest.pt").write_bytes(b"")
        with refused("latest.pt: not a checkpoint.*previous.pt: No such file", run.folder / "latest.pt"):
            run.load_latest()
        (run.folder / "previous.pt").write_bytes(b"x")
        with refused("latest.pt: not a checkpoint.*previous.pt: not a checkpoint", run.folder / "previous.pt"):
            run.load_latest()


def no_links(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


def newest(folder: Path) -> int:
    found = Experiment.open(folder).load_latest()
    epoch = found.state["epoch"]
    assert same(found.state, loaded(a_state(epoch)))
    return epoch


@pytest.mark.parametrize("links", [True, False])
def test_a_crash_at_any_system_call_leaves_a_loadable_generation(tmp_path: Path, links: bool) -> None:
    survived = []
    for fatal in range(1, 50):
        folder = tmp_path / f"{fatal}"

        def body() -> None:
            if not links:
                os.link = no_links
            run = new_experiment(tmp_path, folder.name)  # noqa: B023
            run.save_latest(a_state(1))
            run.save_latest(a_state(2))
            calls = 0

            def dying(call: Callable) -> Callable:
                def wrapped(*args: Any, **options: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == fatal:  # noqa: B023
                        os._exit(9)
                    return call(*args, **options)

                return wrapped

            for name in ("link", "replace", "fsync", "open", "close", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            run.save_latest(a_state(3))
            run.save_latest(a_state(4))

        status = exit_status(fork(body))
        assert not links or (folder / "latest.pt").exists()
        survived.append(newest(folder))
        with Experiment.open(folder, lock="train") as run:
            run.load_latest()
            run.save_latest(a_state(9))
            assert load_checkpoint(folder / "previous.pt")["epoch"] == survived[-1]
            assert names(folder) == [".lock", "args.yaml", "latest.pt", "previous.pt"]
        if status == 0:
            break
        assert status == 9
    assert status == 0
    assert fatal > 8
    assert survived == sorted(survived)
    assert (survived[0], survived[-1]) == (2, 4)


def test_kill_9_at_any_moment_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    new_experiment(tmp_path).close()
    folder = tmp_path / "run"
    chance = random.Random(0)
    reached = 0
    for _ in range(KILLS):
        told_read, told_write = os.pipe()

        def body() -> None:
            run = Experiment.open(folder, lock="train", echo=quiet)
            found = run.load_latest()
            epoch = 0 if found is None else found.state["epoch"]
            run.truncate_metrics(epoch)
            while True:
                os.write(told_write, epoch.to_bytes(4, "little"))  # noqa: B023
                epoch += 1
                run.append_metrics({"epoch": epoch, "loss": 1 / epoch})
                run.save_latest(a_state(epoch))

        child = fork(body)
        os.close(told_write)
        first = os.read(told_read, 4)
        time.sleep(chance.uniform(0, 0.1))
        kill(child)
        with os.fdopen(told_read, "rb") as told:
            finished = int.from_bytes((first + told.read())[-4:], "little")
        assert finished >= reached
        reached = newest(folder) if (folder / "latest.pt").exists() else 0
        assert finished <= reached <= finished + 1
        rows = Experiment.open(folder).read_metrics()
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
        assert reached <= len(rows) <= reached + 1
    assert reached > 0
    Experiment.open(folder, lock="train").close()
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("room", [2_000, 100_000, 402_000])
def test_a_full_disk_leaves_the_files_that_were_there(tmp_path: Path, room: int) -> None:
    """With room for nothing, for some of the tensors, and for all but the last bytes of the checkpoint."""
    with new_experiment(tmp_path) as run:
        for value in (0, 1):
            run.save_latest({"x": torch.full((10,), value)})
        run.save_best({"x": torch.zeros(10)})
        (run.folder / "metrics.csv").write_text("note\n" + ("x" * 99 + "\n") * (room // 100 - 1))
        write_json(run.folder / "autoattack.json", [1])
    before = files(run.folder)

    def body() -> None:
        run = Experiment.open(tmp_path / "run", lock="train", echo=quiet)
        run.load_latest()
        large = {"x": torch.randn(100_000), "y": torch.zeros(100)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        for name, write in {
            "latest.pt": lambda: run.save_latest(large),
            "best.pt": lambda: run.save_best(large),
            "metrics.csv": lambda: run.append_metrics({"note": "y" * 200}),
            "autoattack.json": lambda: write_json(run.folder / "autoattack.json", ["x" * room]),
        }.items():
            with refused(f"^cannot write .*{name}: File too large$", run.folder / name):
                write()

    assert exit_status(fork(body)) == 0
    after = files(run.folder)
    assert {name: after[name] for name in after if name != ".lock"} == {n: before[n] for n in before if n != ".lock"}
    with Experiment.open(run.folder, lock="train") as run:
        assert run.load_latest().path.name == "latest.pt"
        run.save_latest(a_state(3))


def test_metrics_come_back_as_numbers_and_columns_grow(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        assert run.read_metrics() == []
        run.append_metrics({"epoch": 1, "loss": 0.1 + 0.2, "phase": "burn-in, first"})
        run.append_metrics({"phase": 'a "b"', "epoch": 2, "loss": 1e-300})
        assert (run.folder / "metrics.csv").read_text() == (
            'epoch,loss,phase\n1,0.30000000000000004,"burn-in, first"\n2,1e-300,"a ""b"""\n'
        )
        run.append_metrics({"epoch": 3, "margin": None, "found": 0.5})
        assert (run.folder / "metrics.csv").read_text().splitlines() == [
            "epoch,loss,phase,margin,found",
            '1,0.30000000000000004,"burn-in, first",,',
            '2,1e-300,"a ""b""",,',
            "3,,,,0.5",
        ]
    assert Experiment.open(run.folder).read_metrics() == [
        {"epoch": 1, "loss": 0.1 + 0.2, "phase": "burn-in, first", "margin": None, "found": None},
        {"epoch": 2, "loss": 1e-300, "phase": 'a "b"', "margin": None, "found": None},
        {"epoch": 3, "loss": None, "phase": None, "margin": None, "found": 0.5},
    ]


@pytest.mark.parametrize("value", [torch.tensor(1.0), np.float32(1), [1]])
def test_metrics_that_are_not_plain_are_refused(tmp_path: Path, value: Any) -> None:
    with new_experiment(tmp_path) as run, refused("metric 'loss' is a", error=TypeError):
        run.append_metrics({"epoch": 1, "loss": value})
    assert not (run.folder / "metrics.csv").exists()


def test_a_run_cut_and_resumed_has_the_metrics_of_one_that_was_not(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "loss": 1 / epoch} | ({"margin": 0.5} if epoch > 3 else {}) for epoch in range(1, 7)]
    with new_experiment(tmp_path, "whole") as whole:
        for row in rows:
            whole.append_metrics(row)
    expected = (whole.folder / "metrics.csv").read_bytes()
    for cut in range(len(rows) + 1):
        for keep in (cut, lambda row: row["epoch"] <= cut):  # noqa: B023
            with new_experiment(tmp_path, "cut") as run:
                assert run.truncate_metrics(keep) == 0
                assert not (run.folder / "metrics.csv").exists()
                for row in rows[: cut + 1]:
                    run.append_metrics(row)
                with open(run.folder / "metrics.csv", "a") as file:
                    file.write("7,0.1")  # As a crash of a program that appends would leave it.
                assert run.truncate_metrics(keep) == len(rows[: cut + 1]) - cut
                assert [row["epoch"] for row in run.read_metrics()] == list(range(1, cut + 1))
                for row in rows[cut:]:
                    run.append_metrics(row)
            assert (run.folder / "metrics.csv").read_bytes() == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_metrics_keep_their_rows_whatever_ends_their_lines(tmp_path: Path, end: str, last: bool) -> None:
    with new_experiment(tmp_path) as run:
        path = run.folder / "metrics.csv"
        path.write_bytes(end.join(["epoch,loss", "1,0.5", "2,0.25"]).encode() + end.encode() * last)
        rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
        assert run.read_metrics() == rows
        run.truncate_metrics(lambda row: row["epoch"] <= 2)
        run.append_metrics({"epoch": 3, "loss": 0.125})
        assert run.read_metrics() == [*rows, {"epoch": 3, "loss": 0.125}]


def test_metrics_that_lie_are_refused(tmp_path: Path) -> None:
    with new_experiment(tmp_path) as run:
        path = run.folder / "metrics.csv"
        cases = {"a,b\n1\n": "row 2 does not fit the 2 columns", "a,b\n1,2,3\n": "row 2", "a,a\n1,2\n": "row 1"}
        for content, pattern in {**cases, 'a,b\n1,"2\n': "unexpected end of data"}.items():
            path.write_text(content)
            for use in (run.read_metrics, lambda: run.append_metrics({"a": 1}), lambda: run.truncate_metrics(0)):
                with refused(pattern, path):
                    use()


@pytest.mark.parametrize(
    "content", ["\ufeffepoch,loss\n1,0.5\n", "epoch,loss\r\n1,0.5\r\n\r\n", "epoch,loss\n1.0,0.5\n"]
)
def test_metrics_that_another_program_has_saved_again_are_understood(tmp_path: Path, content: str) -> None:
    with new_experiment(tmp_path) as run:
        (run.folder / "metrics.csv").write_bytes(content.encode())
        run.append_metrics({"epoch": 2, "loss": 0.25})
        assert run.read_metrics() == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]


@pytest.mark.parametrize(
    ("content", "what"), [("epoch;loss\n1;0,5\n", "semicolons"), ("epoch\tloss\n1\t0.5\n", "tabs")]
)
def test_metrics_with_other_separators_are_refused_and_left_alone(tmp_path: Path, content: str, what: str) -> None:
    with new_experiment(tmp_path) as run:
        path = run.folder / "metrics.csv"
        path.write_text(content)
        for use in (run.read_metrics, lambda: run.append_metrics({"epoch": 2}), lambda: run.truncate_metrics(1)):
            with refused(f"separated by {what}, not by commas", path):
                use()


@pytest.mark.parametrize("failing", ["storage.lock.FileLock.acquire", "storage.files.os.replace"])
def test_a_folder_that_cannot_be_begun_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(failing, fail)
    with refused("Input/output error"):
        new_experiment(tmp_path)
    assert names(tmp_path) == []


def test_the_log_has_a_line_a_message_with_the_time(tmp_path: Path) -> None:
    said: list[str] = []
    with Experiment.create(tmp_path, "run", SETTINGS, echo=said.append) as run:
        run.log("epoch 1: done")
    with Experiment.open(run.folder, lock="train", echo=said.append) as run:
        run.log("resumed \udc80")
    with Experiment.open(run.folder, lock="eval", echo=said.append) as run:
        run.log("attacked")
    assert said == ["epoch 1: done", "resumed \udc80", "attacked"]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    text = (run.folder / "train.log").read_text()
    assert re.fullmatch(f"{stamp}epoch 1: done\n{stamp}resumed .*\n", text)
    assert re.fullmatch(f"{stamp}attacked\n", (run.folder / "eval.log").read_text())
