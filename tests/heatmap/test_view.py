"""The server of `medsd view`: what it shows, and all that it does not."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsd.errors import ConfigError, DatasetError, OutputError, SlideError
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.view import HOST, ViewServer
from medsd.heatmap.zoom import read_tile
from medsd.record import read_record, rewrite_record
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.slide import open_slide
from tests.heatmap.mapping import map_here
from tests.heatmap.test_report import unpack


@contextmanager
def serving(folder: Path) -> Iterator[ViewServer]:
    with ViewServer(folder) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(mapped: Path) -> Iterator[ViewServer]:
    with serving(mapped.parent) as running:
        yield running


def ask(
    server: ViewServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"{HOST}:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_only_this_machine_is_listened_to(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/"


def test_pages_are_those_of_the_folder_and_lead_to_the_tiles(server: ViewServer, mapped: Path) -> None:
    answer, _ = ask(server, "/")
    assert (answer.status, answer.getheader("Location")) == (302, "/fiducials/report.html?tiles")
    answer, _ = ask(server, "/fiducials/report.html")
    assert (answer.status, answer.getheader("Location")) == (302, "/fiducials/report.html?tiles")
    answer, page = ask(server, "/fiducials/report.html?tiles")
    assert answer.status == 200 and page == (mapped / "report.html").read_bytes()
    policy = answer.getheader("Content-Security-Policy") or ""
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    answer, picture = ask(server, "/fiducials/overlay.png", "HEAD")
    assert (answer.status, picture, answer.getheader("Content-Type")) == (200, b"", "image/png")


def test_the_index_leads_to_the_picture_of_a_slide_without_a_report(tmp_path: Path, mapped: Path) -> None:
    shutil.copytree(mapped, tmp_path / "fiducials")
    (tmp_path / "glass").mkdir()
    (tmp_path / "glass" / "record.json").write_text("{}")
    Image.new("RGB", (2, 2)).save(tmp_path / "glass" / "thumbnail.png")
    with serving(tmp_path) as running:
        answer, picture = ask(running, "/glass/thumbnail.png")
        assert (answer.status, answer.getheader("Content-Type")) == (200, "image/png")
        assert picture == (tmp_path / "glass" / "thumbnail.png").read_bytes()
        assert ask(running, "/glass/record.json")[0].status == 404


def test_tiles_are_the_slides_and_end_with_it(server: ViewServer, fiducial_slide: Path) -> None:
    with open_slide(fiducial_slide) as slide:
        for level, column, row in ((0, 2, 3), (2, 1, 1), (3, 0, 0)):
            answer, jpeg = ask(server, f"/fiducials/tiles/{level}/{column}_{row}.jpg")
            assert answer.status == 200
            shown = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
            expected = read_tile(slide, 2**level, column, row)
            assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 8
    for beyond in ("0/8_0", "0/0_8", "3/1_0", "4/0_0", "99/0_0", "0/9999999_9999999"):
        assert ask(server, f"/fiducials/tiles/{beyond}.jpg")[0].status == 404


@pytest.mark.parametrize("name", ["probability", "gradient_x_activation"])
def test_maps_are_whole(server: ViewServer, mapped: Path, name: str) -> None:
    _, content = ask(server, f"/fiducials/maps/{name}.json")
    layer = json.loads(content)
    values = read_ome_tiff(mapped / f"{'probability' if name == 'probability' else 'saliency'}.ome.tif").values
    np.testing.assert_allclose(unpack(layer), values, atol=layer["step"])


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/fiducials/../../../../../etc/passwd",
        "/fiducials/%2e%2e/%2e%2e/slides.csv",
        "/fiducials/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/fiducials//etc/passwd",
        "/slides.csv",
        "/fiducials/record.json",
        "/fiducials/saliency.ome.tif",
        "/fiducials/",
        "/fiducials",
        "/nobody/report.html",
        "/fiducials/report.html%00",
        "/fiducials/tiles/0/-1_0.jpg",
        "/fiducials/tiles/0/0_0.jpg/../../record.json",
        "/fiducials/maps/..%2Frecord.json",
        "/fiducials/maps/tsm.json",
    ],
)
def test_nothing_else_is_given(server: ViewServer, path: str) -> None:
    answer, content = ask(server, path)
    assert answer.status == 404 and content == b"Not Found"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(server: ViewServer, method: str) -> None:
    assert ask(server, "/fiducials/report.html", method)[0].status == 501


def test_names_that_point_here_from_elsewhere_are_refused(server: ViewServer) -> None:
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1"):
        assert ask(server, "/fiducials/report.html?tiles", host=host)[0].status == 403
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0].status == 302


def test_a_slide_that_is_not_the_one_mapped_gives_no_tiles(tmp_path: Path, mapped: Path) -> None:
    shutil.copytree(mapped.parent, tmp_path / "maps")
    record = tmp_path / "maps" / "fiducials" / "record.json"
    content = read_record(record)
    assert content is not None
    slide = tmp_path / "fiducials.tif"
    shutil.copy(content["result"]["path"], slide)
    content["result"]["path"] = str(slide)
    rewrite_record(record, content)
    os.utime(slide, (0, 0))
    with ViewServer(tmp_path / "maps" / "fiducials") as server, pytest.raises(SlideError, match="not the file"):
        server.slide("fiducials")


def test_a_slide_that_is_not_there_is_called_so_once(
    tmp_path: Path, mapped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(mapped.parent, tmp_path / "maps")
    record = tmp_path / "maps" / "fiducials" / "record.json"
    content = read_record(record)
    assert content is not None
    gone = tmp_path / "gone.tif"
    rewrite_record(record, content | {"result": content["result"] | {"path": str(gone)}})
    with serving(tmp_path / "maps") as server:
        for column in range(3):
            assert ask(server, f"/fiducials/tiles/0/{column}_0.jpg")[0].status == 404
    (told,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert (
        told == f"{gone}: the slide is not there (moved, or on another disk); only what the report holds can be shown"
    )


def test_a_record_has_the_whole_path_of_its_slide(
    tmp_path: Path, small_slide: Path, green_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle names its slides as its configuration does, and `medsd view` starts elsewhere."""
    monkeypatch.chdir(small_slide.parent)
    (row,) = map_here([Path(small_slide.name)], green_weights, tmp_path)
    monkeypatch.chdir(tmp_path)
    with ViewServer(tmp_path) as server:
        assert row.path == str(small_slide) and server.slide("small").read(0, 0, 8, 8).shape == (8, 8, 3)


def test_slides_are_read_in_processes_that_end_with_the_server(mapped: Path) -> None:
    server = ViewServer(mapped.parent)
    slide = server.slide("fiducials")
    assert isinstance(slide, IsolatedSlide) and server.slide("fiducials") is slide
    assert slide.read(0, 0, 8, 8).shape == (8, 8, 3)
    server.server_close()
    with pytest.raises(SlideError, match="was closed"):
        slide.read(0, 0, 8, 8)


def test_mistakes_are_named(tmp_path: Path, server: ViewServer, mapped: Path) -> None:
    with pytest.raises(DatasetError, match="no slide with a report"):
        ViewServer(tmp_path)
    with pytest.raises(ConfigError, match="port"):
        ViewServer(mapped, 70_000)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(OutputError, match="choose another"):
            ViewServer(mapped, taken.getsockname()[1])
