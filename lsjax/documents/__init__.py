"""Documents: texts that are read once and asked about many times.

`document` is one in memory, `read` reads and opens them, `prefill` runs the model, `folder` keeps
them on disk, slice by slice, `library` keeps many of them, `chat` asks one question after another,
and `fingerprint` says which model they belong to.
"""

from lsjax.documents.chat import Chat
from lsjax.documents.chat_text import around_question
from lsjax.documents.document import Document, requests_after, sharing_borders
from lsjax.documents.fingerprint import fingerprint
from lsjax.documents.folder import DocumentFolder
from lsjax.documents.library import read_kept
from lsjax.documents.read import check_options, open_document, read_document, unread_document

__all__ = [
    "Chat",
    "Document",
    "DocumentFolder",
    "around_question",
    "check_options",
    "fingerprint",
    "open_document",
    "read_document",
    "read_kept",
    "requests_after",
    "sharing_borders",
    "unread_document",
]
