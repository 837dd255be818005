"""Where Prefect and MLflow keep their records: SQLite files, or PostgreSQL by address.

What is more special wins: the variables of the tools, then TASKVEC_DATABASE_URL, then the files
.taskvec/prefect/prefect.db and mlflow.db. TASKVEC_DATABASE_URL is one server for both:
``postgresql://user:password@host/NAME`` means the databases NAME_prefect and NAME_mlflow
("taskvec" without a name); `taskvec services up` creates them. Both tools number their tables in a
table of the same name, so they cannot share a database.
"""

import importlib.util
import os
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from taskvec.errors import InvalidInput, MissingDependency, ServiceUnreachable

VARIABLE = "TASKVEC_DATABASE_URL"
PREFECT_VARIABLES = (
    "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL",
)  # fmt: skip
MLFLOW_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+asyncpg")
DRIVER = "psycopg2"
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server as TASKVEC_DATABASE_URL names it."""

    user_info: str
    host: str
    name: str
    options: tuple[tuple[str, str], ...]

    def url(self, tool: str) -> str:
        """Return the address of the database of Prefect or MLflow, with the driver that it uses."""
        driver = {"prefect": "postgresql+asyncpg", "mlflow": f"postgresql+{DRIVER}"}[tool]
        ours = [("ssl" if k == "sslmode" and tool == "prefect" else k, v) for k, v in self.options]
        query = f"?{urlencode(ours)}" if ours else ""
        return f"{driver}://{self.user_info}{self.host}/{quote(self.database(tool))}{query}"

    def database(self, tool: str) -> str:
        """Return the name of a tool's database."""
        return f"{self.name}_{tool}"


def server() -> Server | None:
    """Return the server of TASKVEC_DATABASE_URL; None if it is not set.

    Raises:
        InvalidInput: it is no address of a PostgreSQL server; the message does not repeat it.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in SCHEMES or "/" in parts.path.strip("/"):
        raise InvalidInput(
            f"{VARIABLE} is no address of a PostgreSQL server; expected "
            "postgresql://USER:PASSWORD@HOST:PORT/NAME, with % codes for special characters"
        )
    user_info, at, place = parts.netloc.rpartition("@")
    name = unquote(parts.path.strip("/")) or "taskvec"
    return Server(f"{user_info}{at}", place, name, tuple(parse_qsl(parts.query)))


def prefect() -> dict[str, str]:
    """Return the variables that tell a Prefect server where its database is; none: its own file."""
    if any(os.environ.get(name) for name in PREFECT_VARIABLES):
        return {}  # the server finds them itself
    found = server()
    return {PREFECT_VARIABLES[0]: found.url("prefect")} if found else {}


def mlflow() -> str:
    """Return where MLflow's server keeps its records; empty: nothing says so."""
    found = os.environ.get(MLFLOW_VARIABLE, "")
    if found:
        return found
    known = server()
    return known.url("mlflow") if known else ""


def create() -> list[str]:
    """Create the databases of TASKVEC_DATABASE_URL that do not exist; return their names.

    Raises:
        MissingDependency: there is no driver.
        ServiceUnreachable: the server does not answer, or does not let us in.
    """
    found = server()
    if not found:
        return []
    if importlib.util.find_spec(DRIVER) is None:
        raise MissingDependency(f"{VARIABLE} needs {DRIVER}; pip install 'taskvec[postgres]'")
    import psycopg2
    from psycopg2 import sql

    wanted = [found.database(tool) for tool in ("prefect", "mlflow")]
    query = f"?{urlencode(found.options)}" if found.options else ""
    place = f"postgresql://{found.user_info}{found.host}/postgres{query}"
    try:
        connection = psycopg2.connect(place, connect_timeout=CONNECT_SECONDS)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            known = {row[0] for row in cursor.fetchall()}
            created = [name for name in wanted if name not in known]
            for name in created:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        connection.close()
    except psycopg2.Error as error:
        from flows.redaction import reason

        raise ServiceUnreachable(
            f"the PostgreSQL server of {VARIABLE} does not let us create {' and '.join(wanted)} "
            f"({reason(error)}); create them yourself, or give the user the right CREATEDB"
        ) from None
    return created
