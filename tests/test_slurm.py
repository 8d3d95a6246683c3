"""Batch jobs on a real SLURM of two nodes, started here."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm_cluster
from tests.conftest import ROOT, TINY, clean_environment

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if absent := slurm_cluster.missing():
        pytest.skip(f"SLURM is not installed ({', '.join(absent)})")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for parent in (folder, *folder.parents):  # munge is another user, and has to reach its socket
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    with slurm_cluster.Cluster(folder) as running:
        yield running


def test_two_nodes_train_one_model(cluster: slurm_cluster.Cluster, small_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "tiny", *TINY, "--data", small_data,
        "--runs", tmp_path / "runs", "--device", "cpu",
        cwd=ROOT, environ=clean_environment(),
    )  # fmt: skip
    assert cluster.wait(job, 240) == "COMPLETED", log.read_text()
    run = tmp_path / "runs" / "tiny" / "seed-0"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["test_images"]) == (16, 200)


def test_a_job_that_fails_says_so(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job = cluster.submit(
        "--nodes", 2, "--output", log, "slurm/train.sbatch", "tiny", *TINY, "--data", tmp_path / "nowhere",
        "--runs", tmp_path / "runs", "--device", "cpu",
        cwd=ROOT, environ=clean_environment(),
    )  # fmt: skip
    assert cluster.wait(job, 120) == "FAILED", log.read_text()
    assert "there is none; prepare one with" in log.read_text()
    assert not (tmp_path / "runs").exists()
