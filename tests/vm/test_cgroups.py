"""Control groups of a real kernel that has them all: the one of a guest, whatever the host has."""

import inspect

import msgspec
import pytest

from support.vm.rig import Api, Sandbox
from wrenn_sandbox.host.privileged import cgroups

pytestmark = pytest.mark.vm

_SCRIPT = """
import json, subprocess, sys

root, run = hierarchy(), Path("/root/run")
run.mkdir()
controllers = usable(root)
groups = Groups.make(root, "wrenn-test", run, controllers)
group = root / "wrenn-test" / "vm-one"
(run / group.name).mkdir()
descriptor = groups.open(group.name, Bounds(memory=64 << 20, cpus=0.25, threads=20))

def inside(code):
    argv = [sys.executable, "-c", "import sys; sys.stdin.readline();" + code]
    child = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    os.write(descriptor, str(child.pid).encode())
    output, _ = child.communicate(b"go\\n")
    return child.returncode, output.decode().strip()

hog = inside("b = bytearray(100 << 20)")
modest = inside("b = bytearray(30 << 20)")
many = inside('''
import threading
end, count = threading.Event(), 0
try:
    for _ in range(50):
        threading.Thread(target=end.wait).start()
        count += 1
except RuntimeError:
    pass
end.set()
print(count)
''')
inside("import time\\nwhile time.process_time() < 0.2: pass")
throttled = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
groups.sweep()
kept = group.exists()
(run / group.name).rmdir()
groups.sweep()
swept = not group.exists()
Groups.make(root, "wrenn-test", run, controllers).close()  # as another program does
gone = not (root / "wrenn-test").exists()
groups.sweep()
groups.open("vm-two", Bounds(1 << 30, 2, 9))
bounds = [(group.with_name("vm-two") / name).read_text().strip()
          for name in ("memory.max", "cpu.max", "pids.max")]
groups.remove("vm-two")
groups.close()
left = (root / "wrenn-test").exists()
print(json.dumps(dict(controllers=controllers, hog=hog[0], modest=modest[0], threads=int(many[1]),
                      throttled=int(throttled["nr_throttled"]), kept=kept, swept=swept, gone=gone,
                      bounds=bounds, left=left)))
"""


class _Found(msgspec.Struct):
    controllers: list[str]
    hog: int
    modest: int
    threads: int
    throttled: int
    kept: bool
    swept: bool
    gone: bool
    bounds: list[str]
    left: bool


def test_groups_bound_what_is_in_them_and_go_when_it_ends(api: Api, sandbox: Sandbox) -> None:
    source = inspect.getsource(cgroups) + _SCRIPT
    result = api.exec(sandbox.id, "python3", "-c", source, timeout_sec=60)
    assert result.exit_code == 0, result.stderr
    found = msgspec.json.decode(result.stdout, type=_Found)
    assert found.controllers == list(cgroups.CONTROLLERS)
    assert (found.hog, found.modest) == (-9, 0)
    assert 10 < found.threads < 20
    assert found.throttled > 0
    assert found.kept
    assert found.swept
    assert found.gone
    assert found.bounds == [str(1 << 30), "200000 100000", "9"]
    assert not found.left
