"""manifest.json of a checkpoint: the sha256 of every file, what it is of, and the one hash that names it."""

import hashlib
import json

from kuavo_train.reading import Json

MANIFEST = "manifest.json"


def manifest_hash(manifest: Json) -> str:
    """One hash for the whole checkpoint."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
