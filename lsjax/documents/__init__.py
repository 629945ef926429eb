"""Documents: texts that are read once and asked about many times.

`document` is one in memory, `read` reads and opens them, `prefill` runs the model, `folder` keeps
them on disk, slice by slice, `manifest` says what is there, `library` keeps many of them,
`fingerprint` says which model they belong to, `chat` asks one question after another, and
`question` renders a chat.
"""

from lsjax.documents.chat import Chat
from lsjax.documents.document import Document, requests_after, sharing_borders
from lsjax.documents.fingerprint import fingerprint, hash_of_ids
from lsjax.documents.folder import DocumentFolder
from lsjax.documents.library import read_kept
from lsjax.documents.manifest import PARTS
from lsjax.documents.prefill import document_spec
from lsjax.documents.question import ChatFrame, chat_frame
from lsjax.documents.read import check_options, open_document, read_document, unread_document

__all__ = [
    "PARTS",
    "Chat",
    "ChatFrame",
    "Document",
    "DocumentFolder",
    "chat_frame",
    "check_options",
    "document_spec",
    "fingerprint",
    "hash_of_ids",
    "open_document",
    "read_document",
    "read_kept",
    "requests_after",
    "sharing_borders",
    "unread_document",
]
