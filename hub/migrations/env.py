"""What Alembic runs: on the connection it is given, in the transaction that is open there."""

from alembic import context

from hub.migrations import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata(),
    # SQLite cannot alter most things in place; Alembic copies the table instead.
    render_as_batch=True,
    transactional_ddl=False,
)
context.run_migrations()
