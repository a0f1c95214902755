"""Addresses of images and videos on a page: their bytes, so that the page is one file."""

from __future__ import annotations

import base64

from dit_attn.remote import Place

TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".mp4": "video/mp4",
}  # fmt: skip


def media_type(path: Place) -> str:
    """Return the MIME type of a file by its suffix, PNG for others."""
    return TYPES.get(path.suffix.lower(), "image/png")


def is_video(path: Place) -> bool:
    """Whether a browser plays the file as a video."""
    return media_type(path).startswith("video")


def data_address(data: bytes, kind: str) -> str:
    """Return bytes as a data address of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def file_address(path: Place) -> str:
    """Return a file as a data address."""
    return data_address(path.read_bytes(), media_type(path))
