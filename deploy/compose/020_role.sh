#!/bin/bash
# Run by the postgres image when its volume is empty: the role that the pipeline runs as, as a DBA would make it.
set -e
psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f /migrations/001_role.sql
psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" \
    -c "ALTER ROLE millrace PASSWORD 'millrace'; GRANT SELECT ON public.emails, public.users TO millrace"
