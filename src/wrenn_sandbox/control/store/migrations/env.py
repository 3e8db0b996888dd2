"""Alembic's entry: runs within the connection and transaction that `migrate` opened."""

from alembic import context

from wrenn_sandbox.control.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
