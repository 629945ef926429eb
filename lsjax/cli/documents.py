"""Lists the documents that a --document_cache holds, and deletes them.

lsjax-documents --document_cache ~/documents
lsjax-documents --document_cache ~/documents --delete 0f3a6c1e9b7d2456
"""

import time

from absl import flags

from lsjax.cli.program import run_program, say
from lsjax.documents.library import SavedDocument, delete, saved_documents
from lsjax.runtime.memory import human_bytes

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("document_cache", None, "Folder of saved documents.", required=True)
    flags.DEFINE_multi_string(
        "delete", [], "Name of a document to delete; repeat the flag for several."
    )


def main(_: list[str]) -> None:
    for name in FLAGS.delete:
        delete(FLAGS.document_cache, name)
    documents = saved_documents(FLAGS.document_cache)
    for saved in reversed(documents):
        say(_line(saved))
    say(f"{len(documents)} documents, {human_bytes(sum(d.nbytes for d in documents))}")


def _line(saved: SavedDocument) -> str:
    held = saved.manifest
    share = "whole" if held.done >= held.cached else f"{held.done / held.cached:.0%} read"
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved.used))
    formats = held.fingerprint["kv_cache_dtype"]
    if (kept := held.fingerprint.get("kv_compression", "None")) != "None":
        formats += " " + kept.partition(",")[0]
    return (
        f"{saved.name}  {held.tokens:>9,} tokens  {share:>9}  {human_bytes(saved.nbytes):>10}  "
        f"{formats:>10}  used {used}"
    )


def program() -> None:
    run_program(main, define_flags)
