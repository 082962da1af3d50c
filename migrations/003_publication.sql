-- The publication `millrace_PIPELINE`, and the right to read its tables. After 001, and after the tables exist
-- (the demo's are in 010). Apply as the tables' owner with CREATE on the database, or as a superuser.
--
-- The lock keeps out transactions that have already written to the table: of those, only what they write afterwards
-- would be streamed. Where it times out, apply that part again. A transaction for each table, so that nobody who writes
-- one waits for another. Rows that are there already are read by the reader.

BEGIN;
SET LOCAL lock_timeout = '2s';
LOCK TABLE ONLY public.emails IN SHARE ROW EXCLUSIVE MODE;
CREATE PUBLICATION millrace_mailbox FOR TABLE ONLY public.emails;
COMMIT;

BEGIN;
SET LOCAL lock_timeout = '2s';
LOCK TABLE ONLY public.users IN SHARE ROW EXCLUSIVE MODE;
ALTER PUBLICATION millrace_mailbox ADD TABLE ONLY public.users;
COMMIT;

GRANT USAGE ON SCHEMA public TO millrace;
GRANT SELECT ON public.emails, public.users TO millrace;

-- `millrace setup` then makes the rest, as role millrace: topics, and the slot with its snapshot.
