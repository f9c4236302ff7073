"""Job of kind `emoji`: fetches two packages of npm's registry and makes a folder of pictures with names of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from jobs.data.npm import Package, fetch_package
from jobs.data.specs import EmojiSpec
from jobs.runtime.lease import hold_output
from jobs.runtime.progress import say
from pipelines.errors import UserError
from pipelines.sources.emoji import read_emoji, write_emoji
from pipelines.storage.location import open_store
from pipelines.storage.publish import check_replaceable, publish_folder

KIND = "corpus"
PICTURES = Package(  # MIT: Fluent emoji of Microsoft, 256 x 256 pixels
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NAMES = Package(  # MIT: names and keywords of Unicode's CLDR
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def run(spec: EmojiSpec) -> dict[str, Any]:
    """Write the corpus, or replace an earlier one."""
    store = open_store(spec.out)
    languages = [*spec.emoji.languages, *spec.emoji.new_languages]
    with (
        hold_output(store, KIND, "makes a corpus") as lease,
        tempfile.TemporaryDirectory(prefix="rzen-emoji-") as scratch,
    ):
        check_replaceable(store, KIND)
        try:
            emoji, toned = read_emoji(fetch_package(PICTURES), fetch_package(NAMES), languages)
        except KeyError as error:
            fix = "name folders of the package, such as en, de or pt"
            raise UserError("emoji.languages", f"{error} is not in {NAMES.name}", fix) from error
        counts = write_emoji(Path(scratch), emoji, toned, spec.emoji)
        lease.check()
        publish_folder(Path(scratch), store, KIND)
    say(f"  {len(emoji):,} emoji in {spec.out}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    return {"outputs": [spec.out], "samples": counts}
