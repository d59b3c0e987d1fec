"""kill -9 in the middle of a run costs steps, never the run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from merge.formats.reader import TensorFile
from train.config import TrainConfig
from train.sd15 import train


def wait_for(path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)


def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    wish = config(steps=400, checkpoint_every=3, class_images={"count": 3, "steps": 2})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(wish.model_dump(mode="json")))
    command = [sys.executable, "-m", "cli", "train", str(file), "--output", str(tmp_path / "toy")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "toy.run" / "events.jsonl", '"step": 8,', process)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "toy").exists()

    steps: list[int] = []
    # Stop early: the comparison needs the state after some more steps, not all 400.
    killed_at, compared_at = 8, 14

    def checkpoint(name: str, resume: bool) -> dict[str, torch.Tensor]:
        from train.errors import Interrupted

        done: list[int] = []

        def note(event: dict[str, object]) -> None:
            if event["event"] == "step":
                done.append(int(str(event["step"])))

        try:
            train(
                wish,
                tmp_path / name,
                resume=resume,
                listener=note,
                cancelled=lambda: done[-1] >= compared_at,
            )
        except Interrupted:
            steps.append(done[0])
        path = tmp_path / f"{name}.run" / "checkpoints" / f"step-{done[-1]:07d}.safetensors"
        with TensorFile(path) as file:
            return {key: file.read_tensor(key) for key in file.header.tensors}

    resumed = checkpoint("toy", resume=True)
    whole = checkpoint("whole", resume=False)
    assert steps[1] == 1
    assert 4 <= steps[0] <= killed_at + 20
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
