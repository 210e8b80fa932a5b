"""Memory and processors that a container leaves to a process, by made-up files."""

import pytest
import torch

from nanofit import host, machine

GIB = 2**30
NONE = 2**63 - 4096  # how version 1 says that there is no limit


def v2(limit, used=0, cached=0):
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cached}\nslab 3"}


def v1(limit, used=0, cached=0):
    stat = f"inactive_file 1\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def system(root, groups, files):
    """The root of a system with these lines in /proc/self/cgroup; files: {folder: {name: text}}"""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    (root / "proc" / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 50331648 kB\n")
    for folder, contents in files.items():
        path = root / "sys" / "fs" / "cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (path / name).write_text(f"{text}\n")
    return f"{root}/"


@pytest.mark.parametrize(
    ("groups", "files", "limit", "free"),
    [
        ("0::/\n", {"": v2(4 * GIB, GIB)}, 4, 3),  # a container that sees its own group alone
        ("0::/\n", {"": {"memory.stat": "anon 5"}}, None, 48),  # the machine's root has no limit
        ("0::/a/b\n", {"a": v2(8 * GIB, 7 * GIB), "a/b": v2("max", GIB)}, 8, 1),  # the outer one limits
        ("0::/a/b\n", {"a": v2(8 * GIB, 7 * GIB), "a/b": v2(2 * GIB, GIB // 2)}, 2, 1),  # the inner one; outer's usage
        ("0::/a/b\n", {"a": v2(8 * GIB, 2 * GIB), "a/b": v2(2 * GIB, GIB)}, 2, 1),
        ("0::/a\n", {"a": v2(4 * GIB, 3 * GIB, 2 * GIB)}, 4, 3),  # files' pages are given up
        ("0::/a\n", {"a": v2(2 * GIB, 3 * GIB)}, 2, 0),
        ("5:cpu:/x\n4:memory:/docker/c\n0::/\n", {"memory/docker/c": v1(4 * GIB, GIB, GIB // 2)}, 4, 3.5),
        ("4:memory:/docker/c\n", {"memory": v1(4 * GIB, GIB)}, 4, 3),  # the path is the host's: the top is ours
        ("4:memory:/a/b\n", {"memory": v1(NONE), "memory/a": v1(3 * GIB), "memory/a/b": v1(NONE)}, 3, 3),
        ("3:cpu,memory:/a\n0::/s\n", {"memory/a": v1(3 * GIB), "s": v2(2 * GIB, GIB)}, 2, 1),  # both versions
        ("0::/../other\n", {"": v2(4 * GIB, GIB)}, 4, 3),
        ("4:cpu:/a\n", {"memory": v1(3 * GIB)}, None, 48),
    ],
)  # fmt: skip
def test_the_tightest_limit_of_all_groups(tmp_path, groups, files, limit, free):
    root = system(tmp_path, groups, files)
    assert host.group_memory(root)[0] == (limit and limit * GIB)
    assert host.free_memory(root) == free * GIB


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("0::/a\n", {"a": {"cpu.max": "150000 100000"}}, 2),
        ("0::/a\n", {"a": {"cpu.max": "10000 100000"}}, 1),
        ("0::/a/b\n", {"a": {"cpu.max": "300000 100000"}, "a/b": {"cpu.max": "max 100000"}}, 3),
        ("0::/a\n", {"a": {"cpu.max": "max 100000"}}, 64),
        ("4:cpu,cpuacct:/a\n", {"cpu/a": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}, 64),
        ("4:cpu,cpuacct:/a\n", {"cpu": {"cpu.cfs_quota_us": 400000, "cpu.cfs_period_us": 100000}}, 4),
        ("", {}, 64),
    ],
)
def test_processors_that_a_container_leaves(tmp_path, monkeypatch, groups, files, count):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert host.processors(system(tmp_path, groups, files)) == count


def test_a_system_that_tells_nothing(tmp_path):
    assert host.group_memory(f"{tmp_path}/") == (None, None)
    with pytest.raises(host.UsageError, match="auto_fit measures memory on a CPU by Linux's /proc"):
        host.free_memory(f"{tmp_path}/")


@pytest.mark.parametrize(("variable", "threads"), [(None, 2), ("3", 3)])
def test_torch_takes_no_more_threads_than_there_are_processors_for(monkeypatch, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(host, "processors", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(3)
    try:
        machine.set_device(torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
