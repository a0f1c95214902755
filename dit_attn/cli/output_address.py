"""``--output`` as an fsspec address: what it names, whether it can be reached, and what is said when it is lost."""

from __future__ import annotations

from uuid import uuid4

from dit_attn import files
from dit_attn.errors import RunStopped, reason
from dit_attn.remote import Place, RemotePath, check_reachable, is_address, parse_address, unreachable

FLAG = "--output"


def check_output(given: str | None) -> None:
    """Refuse an address that is none, or cannot be reached; nothing is written, and nothing heavy is imported.

    Args:
        given: the text of ``--output``; a path is left alone.

    Raises:
        DitAttnError: so it is, or a library is missing.
    """
    if given is not None and is_address(given):
        check_reachable(parse_address(given, FLAG), FLAG)


def prepare_address(folder: RemotePath) -> None:
    """Make the folder where there are folders, and try to write in it.

    Raises:
        DitAttnError: it cannot be written.
    """
    probe = folder / f"{files.TEMPORARY}{uuid4().hex}"
    try:
        folder.mkdir()
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise unreachable(FLAG, folder, error) from error


def lost(place: Place | str, action: str, error: OSError) -> RunStopped:
    """Return the error for an address that could be reached when the run began.

    Args:
        place: the file or folder.
        action: what cannot be done with it, e.g. ``"write"``.
        error: what was raised.
    """
    return RunStopped(
        f"cannot {action} {place} ({reason(error)}); finished items are saved: check the network and the credentials, "
        "then run the same command with --resume"
    )
