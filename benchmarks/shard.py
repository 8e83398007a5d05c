"""A pytest plugin: of the collected tests those of one shard, MIR_SHARD="I/N", in runs of eight that share kernels."""

import os

TOGETHER = 8  # neighbours compile the same kernels


def pytest_collection_modifyitems(items: list) -> None:
    part, parts = map(int, os.environ.get("MIR_SHARD", "0/1").split("/"))
    items[:] = [item for i, item in enumerate(items) if i // TOGETHER % parts == part]
