"""Checkpoints of several ranks in S3: the real protocol, against moto's server."""

from __future__ import annotations

from collections.abc import Callable

from resilient.log.run_log import RunLog
from storage.open import open_store
from tests.s3 import S3Server
from tests.worlds import World

TRAINING = "tests.resilient.training"


def test_a_checkpoint_in_s3_restores_on_another_number_of_ranks(
    world: Callable[..., World], s3_server: S3Server, s3_url: str
) -> None:
    options = s3_server.options()
    saved = world(2).run(f"{TRAINING}:save_one", url=s3_url, layout="fsdp2", options=options)[0]
    view = RunLog(open_store(s3_url, options)).read()
    assert [commit.step for commit in view.commits] == [2]
    (found,) = world(1).run(f"{TRAINING}:restore_many", urls={"s3": s3_url}, layout="dp1", options=options)
    assert found["s3"] == saved
