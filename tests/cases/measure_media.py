"""What independent tools see in the files of `media/`, as `values.json`. Run by hand, where the tools are installed:

    python -m tests.cases.measure_media

Videos: ffmpeg shows each frame in file order, in square pixels, on white. Pages: pdftoppm. Texts: pdftotext. Images:
ImageMagick on white, converted to sRGB by the profile of the file. A picture becomes the mean colors of its cells.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

FILES = Path(__file__).parent / "media"
VALUES = FILES / "values.json"
VIDEO_GRID, IMAGE_GRID = (2, 2), (4, 4)  # columns, rows
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".ts", ".mpg", ".ogv")
# Their Exif data say 6. This version of ImageMagick does not read them there.
_EXIF = dict.fromkeys(("png_exif_after_pixels.png", "webp_exif_6.webp"), ("-orient", "right-top"))
# Display orientation within the H.264 stream: flips first, then turns. This ffmpeg applies it to the first frame only.
_SEI = {
    "sei_hflip.mp4": ",hflip",
    "sei_vflip.mp4": ",vflip",
    "sei_rot90.mp4": ",transpose=cclock",
    "sei_rot90_hflip.mp4": ",hflip,transpose=cclock",
}
_IMAGES = (".jpg", ".png", ".gif", ".bmp", ".tif", ".webp", ".avif")


def grid(pixels_HWC: np.ndarray, columns_rows: tuple[int, int]) -> list[list[int]]:
    """Mean color of each cell, row by row. Cells are cut where pixels are."""
    columns, rows = columns_rows
    height, width = pixels_HWC.shape[:2]
    cells = []
    for row in range(rows):
        band = pixels_HWC[row * height // rows : (row + 1) * height // rows]
        for column in range(columns):
            cell = band[:, column * width // columns : (column + 1) * width // columns]
            cells.append([round(float(value)) for value in cell.mean(axis=(0, 1))])
    return cells


def _out(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout


def _version(tool: str, *option: str) -> str:
    answer = subprocess.run([tool, *option], check=False, capture_output=True, text=True)
    return re.search(r"[\d.]+\d", answer.stdout + answer.stderr)[0]  # type: ignore[index]


def _video(path: Path) -> dict[str, Any]:
    fields = "stream=codec_name,width,height,sample_aspect_ratio:stream_tags=alpha_mode:stream_side_data=rotation"
    shown = _out("ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", fields, "-of", "json", str(path))
    streams = json.loads(shown)["streams"]
    if not streams:
        return {"rejected": "no_video_stream"}
    stream = streams[0]
    across, down = map(int, stream.get("sample_aspect_ratio", "1:1").split(":"))
    width, height = stream["width"], stream["height"]
    if down and across > down:
        width = round(width * across / down)
    elif across and across < down:
        height = round(height * down / across)
    decoder = ["-c:v", f"libvpx-{stream['codec_name']}"] if "alpha_mode" in stream.get("tags", {}) else []
    quarter = any("rotation" in data and data["rotation"] % 180 for data in stream.get("side_data_list", []))
    if quarter:
        width, height = height, width
    turn = _SEI.get(path.name, "")
    scale = f"scale={width}:{height},showinfo{turn}"
    if "transpose" in turn:
        width, height = height, width
    graph = f"[0:v]{scale},format=rgb24"
    if "alpha" in path.name:
        white = f"color=white:s={width}x{height},format=rgb24[white]"
        graph = f"{white};[0:v]{scale},format=rgba[top];[white][top]overlay=format=rgb:shortest=1,format=rgb24"
    decoder += ["-threads", "1", *(["-noautorotate"] if turn else [])]
    command = ["ffmpeg", "-v", "info", *decoder, "-i", str(path)]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        shown_by = ["-filter_complex", graph, "-fps_mode", "passthrough", "-f", "rawvideo", str(raw)]
        told = subprocess.run([*command, *shown_by], check=True, capture_output=True, text=True).stderr
        frames = np.frombuffer(raw.read_bytes(), np.uint8).reshape(-1, height, width, 3)
    times_s = [float(found) for found in re.findall(r"pts_time:([\d.]+)", told)][: len(frames)]
    return {
        "size": [width, height],
        "times_s": [round(time_s - times_s[0], 3) for time_s in times_s],
        "frames": [grid(frame, VIDEO_GRID) for frame in frames],
    }


def _image(path: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        profile, png = Path(folder, "srgb.icc"), Path(folder, "out.png")
        profile.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        convert = ["convert", f"{path}[0]", "-coalesce", *_EXIF.get(path.name, ()), "-auto-orient"]
        if Image.open(path).info.get("icc_profile"):
            convert += ["-profile", str(profile)]
        _out(*convert, "-background", "white", "-alpha", "remove", "-depth", "8", f"png24:{png}")
        pixels = np.asarray(Image.open(png).convert("RGB"))
    return {"size": [pixels.shape[1], pixels.shape[0]], "grid": grid(pixels, IMAGE_GRID)}


def _page(path: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        _out("pdftoppm", "-png", "-r", "144", "-cropbox", "-singlefile", str(path), f"{folder}/page")
        pixels = np.asarray(Image.open(Path(folder, "page.png")).convert("RGB"))
    text = _out("pdftotext", "-enc", "UTF-8", str(path), "-").decode().replace("\f", "").split()
    size = [pixels.shape[1], pixels.shape[0]]
    return {"size": size, "grid": grid(pixels, IMAGE_GRID), "text": " ".join(text)}


def main() -> None:
    tools = {"ffmpeg": "-version", "pdftoppm": "-v", "convert": "-version"}
    values: dict[str, Any] = {"tools": {tool: _version(tool, option) for tool, option in tools.items()}, "files": {}}
    for path in sorted(FILES.iterdir()):
        measure = _video if path.suffix in _VIDEOS else _image if path.suffix in _IMAGES else _page
        if path.suffix in (*_VIDEOS, *_IMAGES, ".pdf"):
            values["files"][path.name] = measure(path)
    lines = [
        f"  {json.dumps(name)}: {json.dumps(found, ensure_ascii=False)}" for name, found in values["files"].items()
    ]
    VALUES.write_text(f'{{"tools": {json.dumps(values["tools"])}, "files": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
