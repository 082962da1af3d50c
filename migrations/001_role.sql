-- The role that runs a pipeline: it may log in, replicate, and read the published tables (003 grants that);
-- it owns nothing and needs no superuser. Apply as a superuser or, on a managed server, as its administrator.
-- Change the name to that of `postgres.url`, and give it a password: \password millrace

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'millrace') THEN
        CREATE ROLE millrace LOGIN;
    END IF;
    -- Managed servers give the right by membership instead of the attribute.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication') THEN
        GRANT rds_replication TO millrace;
    ELSE
        ALTER ROLE millrace REPLICATION;
    END IF;
END
$$;

-- Optional: lets `millrace status` see sessions of other roles.
GRANT pg_read_all_stats TO millrace;
