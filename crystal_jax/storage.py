"""A look, before any work, whether gs:// can be used: the bucket, permissions, credentials, each fault in one line.

Its invariant: only what a restart can't help is called a mistake; a storage that is away for a while is none.
"""

from crystal_jax import files
from crystal_jax.errors import UserError, refusal


def check(path: files.Location) -> None:
    """Looks, with one request, whether storage can be used; local paths pass.

    Raises:
      UserError: no such bucket, no permission to list it, no valid credentials.
      Exception: of the client, where storage can't be reached.
    """
    place = files.as_path(path)
    if not files.is_remote(place):
        return
    bucket, key = files.split(place)
    try:
        files.gcsfs().call("GET", "b/{}/o", bucket, prefix=key, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        raise UserError(f"{place}: no such bucket; create it, or correct the name") from error
    except Exception as error:
        if line := refusal(error):
            raise UserError(f"{place}: {line}") from error
        raise
