"""Writes images and prose in common formats; each function returns the path that holds both."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = 12


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8))


def png(number):
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def prose(number):
    return f"prose of row {number}, déjà vu"


def dataset():
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "caption": datasets.Value("string")}
    )
    stored = [{"bytes": png(number), "path": None} for number in range(ROWS)]
    rows = {"id": list(range(ROWS)), "image": stored, "caption": [prose(number) for number in range(ROWS)]}
    return datasets.Dataset.from_dict(rows, features=features)


def saved(root):
    dataset().save_to_disk(root / "saved")
    return root / "saved"


def splits(root):
    parts = {"train": dataset().select(range(7)), "test": dataset().select(range(7, ROWS))}
    datasets.DatasetDict(parts).save_to_disk(root / "splits")
    return root / "splits"


def selected(root):
    """A data set whose rows are in another order than in its file."""
    dataset().select(list(range(ROWS))[::-1]).save_to_disk(root / "selected")
    return root / "selected"


def parquet(root):
    dataset().to_parquet(root / "data.parquet", batch_size=5)
    return root / "data.parquet"


def arrow(root):
    return next(saved(root).glob("*.arrow"))


def plain_table():
    """A table with ordinary column names and without `datasets` features."""
    columns = {"image_bytes": [png(n) for n in range(ROWS)], "label": ["x"] * ROWS}
    return pa.table(columns | {"text": [prose(n) for n in range(ROWS)]})


def plain_parquet(root):
    pq.write_table(plain_table(), root / "plain.parquet", row_group_size=ROWS)
    return root / "plain.parquet"


def feather(root):
    with pa.OSFile(str(root / "table.arrow"), "wb") as file, pa.ipc.new_file(file, plain_table().schema) as writer:
        writer.write_table(plain_table())
    return root / "table.arrow"


def paths_in_a_table(root):
    write_png(root / "pictures")
    table = {"image": [f"pictures/{n}.png" for n in range(ROWS)], "text": [prose(n) for n in range(ROWS)]}
    pq.write_table(pa.table(table), root / "paths.parquet")
    return root / "paths.parquet"


def shards(root):
    """A folder of .parquet files like a data set cloned from the hub, with a README.md and .json metadata."""
    (root / "clone" / "data").mkdir(parents=True)
    for shard in range(3):
        dataset().shard(3, shard, contiguous=True).to_parquet(root / "clone" / "data" / f"train-{shard}.parquet")
    (root / "clone" / "README.md").write_text("# what this is")
    (root / "clone" / "infos.json").write_text('{"text": "no prose of the data set"}')
    return root / "clone"


def tar(root, beside=("txt", "json")):
    path = root / "shard-000.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(ROWS):
            record = {"caption": prose(number)} if beside == ("json",) else {"width": 7}
            files = {"png": png(number), "txt": prose(number).encode(), "json": json.dumps(record).encode()}
            for suffix in ("png", *beside):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(files[suffix])
                archive.addfile(member, io.BytesIO(files[suffix]))
    return path


def tar_of_records(root):
    return tar(root, ("json",))


def folder_of_tars(root):
    (root / "tars").mkdir()
    tar(root / "tars")
    return root / "tars"


def write_png(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(ROWS):
        (folder / f"{number}.png").write_bytes(png(number))


def conversation(number):
    turns = [("human", "<image>\nWhat is this?"), ("gpt", prose(number)), ("human", "no prose")]
    turns = [{"from": speaker, "value": said} for speaker, said in turns]
    return {"id": str(number), "image": f"coco/{number}.png", "conversations": turns}


def llava(root):
    write_png(root / "coco")
    (root / "llava.json").write_text(json.dumps([conversation(n) for n in range(ROWS)], indent=1, ensure_ascii=False))
    return root / "llava.json"


def llava_with_images_beside(root):
    write_png(root / "images" / "coco")
    text = json.dumps([conversation(n) for n in range(ROWS)])
    (root / "llava.json").write_text(text, encoding="utf-8-sig")
    return root / "llava.json"


def llava_lines(root):
    write_png(root / "coco")
    (root / "llava.jsonl").write_text("\n".join(json.dumps(conversation(n)) for n in range(ROWS)))
    return root / "llava.jsonl"


def lines_by_another_name(root):
    llava_lines(root).rename(root / "lines.json")
    return root / "lines.json"


def coco(root):
    """COCO captions: lists of images and annotations in one object."""
    write_png(root / "images")
    whole = {"info": {"year": 2017, "licenses": [1, 2]}, "licenses": [{"id": 1}]}
    whole |= {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(ROWS)]}
    whole |= {"annotations": [{"image_id": n, "caption": prose(n)} for n in range(ROWS)]}
    (root / "captions.json").write_text(json.dumps(whole, ensure_ascii=False))
    return root / "captions.json"


SOURCES = [saved, splits, selected, parquet, arrow, plain_parquet, feather, paths_in_a_table, shards]
SOURCES += [tar, tar_of_records, folder_of_tars, llava, llava_with_images_beside, llava_lines]
SOURCES += [lines_by_another_name, coco]
