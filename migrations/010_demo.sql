-- The demo's application: a mailbox.

CREATE TABLE IF NOT EXISTS public.users (
    id bigint PRIMARY KEY,
    name text,
    email text
);

CREATE TABLE IF NOT EXISTS public.emails (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id bigint,
    sender text,
    folder text,
    subject text,
    body text,
    is_read boolean,
    sent_at timestamptz
);

-- The counters subtract what a row counted for before it changed, so they need the whole old row.
ALTER TABLE public.emails REPLICA IDENTITY FULL;
