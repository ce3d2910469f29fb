"""Two machines on one: network namespaces joined by a cable (veth), each with its own hostname and mounts. Root only.

    python records/2026-11-21_two_nodes/rehearse.py 'DATA/*.parquet' FOLDER

Runs of the same 60 steps on 2 nodes, torchrun on each as a user starts it: straight; with a node killed and started
again, at different moments; with both killed; and starts that must be refused, because a node has another option, other
data, other code, no data, or an out_dir of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
NODES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
STEPS = 60
TRAIN = [
    "--block_size=64", "--n_layer=2", "--n_head=2", "--n_embd=64", "--batch_size=4", "--total_batch_size=1024",
    f"--max_steps={STEPS}", "--warmup_steps=5", "--learning_rate=3e-3", "--val_interval=20", "--val_tokens=4096",
    "--checkpoint_interval=10", "--keep_checkpoints=0", "--log_interval=1", "--dropout=0.1", "--device=cpu",
]  # fmt: skip


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


def connect(work: Path) -> None:
    (work / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in {"localhost": "127.0.0.1", **NODES}.items()))
    for name in NODES:
        sh(f"ip netns add {name} && ip -n {name} link set lo up")
    sh("ip link add cable1 netns node1 type veth peer name cable2 netns node2")
    for number, (name, ip) in enumerate(NODES.items(), 1):
        sh(f"ip -n {name} addr add {ip}/24 dev cable{number} && ip -n {name} link set cable{number} up")


def disconnect() -> None:
    for name in NODES:
        kill_node(name)
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def on_node(name: str, work: Path, command: list, mounts: dict, log: Path) -> subprocess.Popen:
    """A command on a node; `mounts`: {path that all nodes use: folder that this node has there}."""
    steps = ["mount --make-rprivate /", f"mount --bind {work}/hosts /etc/hosts", f"hostname {name}"]
    for place, own in mounts.items():
        Path(place).mkdir(parents=True, exist_ok=True)
        Path(own).mkdir(parents=True, exist_ok=True)
        steps.append(f"mount --bind {own} {place}")
    script = " && ".join([*steps, 'exec "$@"'])
    interface = f"cable{1 + list(NODES).index(name)}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, "PYTHONUNBUFFERED": "1"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a node that comes back waits for an address in vain
    inside = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", *map(str, command)]
    with open(log, "a") as out:
        return subprocess.Popen(inside, stdout=out, stderr=out, cwd=ROOT, env=env, start_new_session=True)


def kill_node(name: str) -> None:
    """As when the power goes: every process on it, at once."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in found:
        os.kill(int(pid), signal.SIGKILL)


class Run:
    """A training run on both nodes."""

    def __init__(self, work: Path, name: str):
        self.work, self.folder = work, work / name
        self.out = self.folder / "out"
        self.out.mkdir(parents=True)
        self.nodes: dict[str, subprocess.Popen] = {}

    def start(self, node: str, *options: str, code: Path = ROOT, mounts: dict | None = None) -> None:
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
            "--rdzv_backend=c10d", "--rdzv_endpoint=node1:29500", "--rdzv_id=7",
        ]  # fmt: skip
        train = [code / "train_gpt2.py", f"--data_dir={self.work}/data", f"--out_dir={self.out}", *TRAIN, *options]
        log = self.folder / f"{node}.log"
        self.nodes[node] = on_node(node, self.work, [*torchrun, *train], mounts or {}, log)

    def records(self, kind: str) -> list[dict]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be half written
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def wait_for_step(self, step: int) -> None:
        for _ in range(3000):
            if any(record["step"] >= step for record in self.records("train")):
                return
            assert any(node.poll() is None for node in self.nodes.values()), self.tail()
            time.sleep(0.02)
        raise TimeoutError(self.tail())

    def finish(self) -> list[int]:
        return [self.nodes[name].wait(timeout=240) for name in NODES]

    def tail(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.log"))

    def result(self) -> tuple[dict, list]:
        state = torch.load(self.out / f"ckpt_{STEPS:06d}.pt", weights_only=True)
        losses = [(r["step"], r["loss"], r["grad_norm"]) for r in self.records("train")]
        return state, losses + [(r["step"], r["val_loss"]) for r in self.records("val")]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


def compare(run: Run, straight: Run, began: float) -> None:
    (state, losses), (want, want_losses) = run.result(), straight.result()
    bits = all(same(state[name], want[name]) for name in ("model", "optimizer", "best", "step"))
    resumed = [event["step"] for event in run.records("event") if event["event"] == "resume"]
    print(
        f"{run.folder.name}: resumed at {resumed}, {time.time() - began:.0f} s; "
        f"weights and optimizer {'the same bits' if bits else 'DIFFER'}, "
        f"losses, norms and val losses {'the same' if losses == want_losses else 'DIFFER'}",
        flush=True,
    )


def prepare(work: Path, files: str) -> None:
    options = [f"--files={files}", "--tokenizer=bytes", "--shard_tokens=200000", f"--out_dir={work}/data"]
    subprocess.run([sys.executable, "fineweb.py", *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def killed(work: Path, name: str, straight: Run, kills: list[tuple[int, list[str]]]) -> None:
    """A run whose nodes are killed: (at which step, which of them). They are started again with --resume=True."""
    run, began = Run(work, name), time.time()
    for node in NODES:
        run.start(node, "--resume=True")
    for step, nodes in kills:
        run.wait_for_step(step)
        for node in nodes:
            kill_node(node)
        time.sleep(1)
        for node in nodes:
            run.nodes[node].wait()
            run.start(node, "--resume=True")
    print(name, "exit statuses", run.finish(), flush=True)
    compare(run, straight, began)


def refused(work: Path, name: str, *options: str, **more: object) -> None:
    """A start whose second node differs."""
    run = Run(work, name)
    run.start("node1", "--max_steps=2")
    run.start("node2", "--max_steps=2", *options, **more)
    statuses = run.finish()
    logs = {node: (run.folder / f"{node}.log").read_text() for node in NODES}
    lines = {node: sorted({s for s in text.splitlines() if s.startswith("error: ")}) for node, text in logs.items()}
    print(f"{name}: {statuses}, " + json.dumps(lines, indent=1).replace(str(work), "WORK"), flush=True)


def main() -> None:
    files, work = sys.argv[1], Path(sys.argv[2]).resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    disconnect()
    connect(work)
    try:
        prepare(work, files)
        straight = Run(work, "straight")
        began = time.time()
        for node in NODES:
            straight.start(node)
        print("straight: exit statuses", straight.finish(), f"{time.time() - began:.0f} s", flush=True)
        killed(work, "node2_killed", straight, [(25, ["node2"])])
        killed(work, "node2_killed_twice", straight, [(13, ["node2"]), (44, ["node2"])])
        killed(work, "both_killed", straight, [(25, ["node1", "node2"])])
        other = work / "other_code"
        shutil.copytree(ROOT, other, ignore=shutil.ignore_patterns(".git", "records", "tests"))
        with open(other / "model.py", "a") as file:
            file.write("# a change\n")
        shutil.copytree(work / "data", work / "other_data")
        (work / "nothing").mkdir()
        first = sorted((work / "other_data").glob("*_train_*.bin"))[0]
        first.unlink()
        meta = json.loads((work / "other_data" / "meta.json").read_text())
        meta["train_tokens"] -= meta["shards"]["train"].pop(first.name)[0]
        (work / "other_data" / "meta.json").write_text(json.dumps(meta))
        refused(work, "other_option", "--seed=2")
        refused(work, "other_code_there", code=other)
        refused(work, "other_data_there", mounts={work / "data": work / "other_data"})
        refused(work, "no_data_there", mounts={work / "data": work / "nothing"})
        refused(work, "out_dir_not_shared", mounts={work / "out_dir_not_shared" / "out": work / "own_out"})
    finally:
        disconnect()


if __name__ == "__main__":
    main()
