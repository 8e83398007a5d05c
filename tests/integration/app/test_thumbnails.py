"""Small pictures of samples: every kind of image, rotated by its EXIF; broken ones do not stop a run."""

import base64
import io
import tarfile

import pytest
from PIL import Image

from modality_integration.app.samples import Sample, Text, choose_images
from modality_integration.app.thumbnails import sample_cards


def card(image, text="prose"):
    (made,) = sample_cards([Sample(image, Text("news.txt", text))])
    return made


def picture(made):
    return Image.open(io.BytesIO(base64.b64decode(made["jpeg"])))


@pytest.mark.parametrize(
    ("size", "small"), [((640, 320), (160, 80)), ((30, 20), (30, 20)), ((200, 3000), (11, 160)), ((4000, 1), (160, 1))]
)
def test_picture_is_a_jpeg_of_at_most_160_pixels_of_the_same_shape(tmp_path, size, small):
    file = tmp_path / "image.png"
    Image.linear_gradient("L").resize(size).convert("RGB").save(file)
    made = card(file)
    with picture(made) as opened:
        assert opened.format == "JPEG"
        assert opened.size == small
    assert len(made["jpeg"]) < 12_000
    assert made["name"] == "image.png with news.txt"


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "I;16", "F", "CMYK"])
def test_every_kind_of_image_has_a_picture(tmp_path, mode):
    file = tmp_path / ("image.tif" if mode in ("F", "CMYK") else "image.png")
    Image.linear_gradient("L").convert(mode).save(file)
    with picture(card(file)) as opened:
        assert opened.size == (160, 160)


def test_picture_is_turned_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (100, 50), "white")
    image.paste("red", (0, 0, 50, 50))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side of the file is up
    image.save(tmp_path / "image.jpg", exif=exif, quality=95)
    with picture(card(tmp_path / "image.jpg")) as opened:
        assert opened.size == (50, 100)
        assert opened.getpixel((25, 10))[1] < 60  # red is at the top
        assert opened.getpixel((25, 90))[1] > 200
        assert not opened.getexif()


def test_picture_of_an_archive_is_read_from_there(tmp_path):
    Image.new("RGB", (320, 80), "red").save(tmp_path / "image.png")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "image.png", "image.png")
    (tmp_path / "image.png").unlink()
    (source,) = choose_images(tmp_path / "images.tar", 1, 0).items
    made = card(source)
    with picture(made) as opened:
        assert opened.size == (160, 40)
        assert opened.getpixel((80, 20))[0] > 200
    assert "image.png" in made["name"]


def test_picture_in_memory_is_left_as_it_was():
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    before = image.tobytes()
    with picture(card(image)) as opened:
        assert opened.size == (160, 107)
    assert (image.size, image.tobytes()) == ((300, 200), before)


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_image_that_cannot_be_opened_any_more_has_no_picture(tmp_path, content):
    file = tmp_path / "image.png"
    if content is not None:
        file.write_bytes(content)
    assert card(file) == {"name": "image.png with news.txt", "text": "prose", "jpeg": None}


def test_cards_are_of_the_first_samples_with_the_beginning_of_their_prose():
    samples = [Sample(Image.new("RGB", (9, 9)), Text(f"{k}.txt", f"{k} " + "word " * 100)) for k in range(20)]
    made = sample_cards(samples)
    assert [one["text"].split()[0] for one in made] == [str(k) for k in range(12)]
    assert {len(one["text"]) for one in made} == {200}
    assert len(sample_cards(samples, most=3)) == 3
    assert sample_cards([]) == []
