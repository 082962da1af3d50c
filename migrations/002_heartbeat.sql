-- The heartbeat table: one row per pipeline, written by the reader every minute. It is how a server that was
-- restored to an older state is told from one that was not. After 001; `mailbox` is the pipeline's name.

CREATE SCHEMA IF NOT EXISTS millrace;

CREATE TABLE IF NOT EXISTS millrace.heartbeat (
    pipeline text PRIMARY KEY,
    beat bigint NOT NULL,
    nonce text NOT NULL,
    at timestamptz NOT NULL
);

INSERT INTO millrace.heartbeat (pipeline, beat, nonce, at) VALUES ('mailbox', 0, '', now())
ON CONFLICT (pipeline) DO NOTHING;

GRANT USAGE ON SCHEMA millrace TO millrace;
GRANT SELECT, INSERT, UPDATE ON millrace.heartbeat TO millrace;
