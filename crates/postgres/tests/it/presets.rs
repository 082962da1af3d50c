//! What a database or a role presets, or puts in the place of what the catalog has, changes nothing.

use postgres::catalog::connect;
use postgres::setup::{make_heartbeat, members, published};
use postgres::{Config, PostgresSource, SourceOptions, check};
use relay::{Heartbeat, PublishedTable, ReadRequest, RowChange, Source as _, WalEvent};
use testkit::services::Postgres;

use crate::support::*;

/// Presets of role `preset`: every setting that a role can have, to another value than its own.
const PRESETS: &str = "
DO $$ DECLARE s record; v text;
BEGIN
    FOR s IN SELECT * FROM pg_settings WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend')
             AND name NOT IN ('role', 'session_authorization', 'session_preload_libraries')
    LOOP
        v := CASE WHEN s.name = 'search_path' THEN 'nowhere'
                  WHEN s.name = 'TimeZone' THEN 'Asia/Tokyo'
                  WHEN s.name = 'DateStyle' THEN 'German, DMY'
                  WHEN s.name = 'client_encoding' THEN 'LATIN1'
                  WHEN s.name = 'default_tablespace' THEN ''
                  WHEN s.name = 'local_preload_libraries' THEN 'nowhere'
                  WHEN s.vartype = 'bool' THEN CASE s.setting WHEN 'on' THEN 'off' ELSE 'on' END
                  WHEN s.vartype = 'enum' THEN (SELECT max(e) FROM unnest(s.enumvals) e WHERE e <> s.setting)
                  WHEN s.vartype = 'integer' AND s.name LIKE '%timeout' AND s.name <> 'wal_sender_timeout' THEN '50'
             END;
        CONTINUE WHEN v IS NULL;
        BEGIN
            EXECUTE format('ALTER ROLE preset SET %I = %L', s.name, v);
        EXCEPTION WHEN OTHERS THEN RAISE NOTICE '% = %: %', s.name, v, SQLERRM;
        END;
    END LOOP;
END $$";

const VALUES: &str = "INSERT INTO a VALUES (1, '2025-01-19 12:34:56+00', '1 day 02:00', 0.1::float4, '\\x01', 1234.5, '{NULL}')";

const STREAMED: &str = "1,2025-01-19 12:34:56+00,1 day 02:00:00,0.1,\\x01,$1,234.50,{NULL}";

fn as_preset(server: &Postgres) -> Config {
    config(&server.url("postgres").replace("postgres@", "preset@"))
}

#[test]
fn no_setting_that_a_role_can_have_reaches_a_session() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE ROLE preset SUPERUSER LOGIN;
         CREATE TABLE a (id int PRIMARY KEY, at timestamptz, i interval, f float4, b bytea, m money, n text[])",
    );
    set_up(&server, "a");
    server.sql("postgres", PRESETS);
    let set: i64 =
        server.value("postgres", "SELECT cardinality(setconfig) FROM pg_db_role_setting").parse().unwrap();
    assert!(set > 80, "{set} settings are preset");
    server.sql("postgres", VALUES);

    let runtime = runtime();
    let config = as_preset(&server);
    let options = SourceOptions { heartbeat: "t".into(), ..options(&["public.a"]) };
    let mut source = PostgresSource::connect(runtime.handle(), &config, options).unwrap();
    source.write_heartbeat(&Heartbeat { beat: 1, nonce: "x".into() }).unwrap();
    source.start(lsn(&server, "SELECT confirmed_flush_lsn FROM pg_replication_slots")).unwrap();
    // Longer than any of the timeouts.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let mut streamed = None;
    while streamed.is_none() {
        source
            .poll(PATIENCE, &mut |event| {
                if let WalEvent::Row { change: RowChange::Insert { new }, .. } = event {
                    streamed.get_or_insert_with(|| row(new));
                }
                Ok(())
            })
            .unwrap();
    }
    assert_eq!(streamed.as_deref(), Some(STREAMED));

    let mut read = Vec::new();
    let requests = source.published().unwrap().tables.iter().map(whole_table).collect::<Vec<_>>();
    source
        .read(&requests, 1 << 20, &mut |_| true, &mut |event| {
            if let relay::RoundEvent::Row(tuple) = event {
                read.push(row(tuple));
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(read, [STREAMED]);

    let findings = runtime.block_on(async {
        let mut client = connect(&config).await.unwrap();
        make_heartbeat(&mut client, &plan(&["a"])).await.unwrap();
        check::tables(&client, &plan(&["a"])).await.unwrap()
    });
    assert!(findings.iter().all(|finding| finding.verdict == check::Verdict::Good), "{findings:?}");
}

fn whole_table(table: &PublishedTable) -> ReadRequest {
    ReadRequest {
        relation: table.relation,
        key: Vec::new(),
        description: None,
        storage: None,
        after: None,
        only_keys: false,
        keys: Vec::new(),
    }
}

/// Functions that would be called instead of the catalog's by a session that looks for names in `public`.
const TRAPS: &str = "
CREATE TABLE public.t (id int PRIMARY KEY, v text);
CREATE FUNCTION public.trap() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        EXECUTE 'ALTER ROLE app SUPERUSER';
    END IF;
END $$;
DO $$ DECLARE t text;
BEGIN
    FOREACH t IN ARRAY ARRAY['pg_publication', 'pg_publication_rel', 'pg_collation', 'pg_database', 'pg_replication_slots']
    LOOP
        EXECUTE format('CREATE FUNCTION public.to_jsonb(pg_catalog.%I) RETURNS jsonb LANGUAGE plpgsql AS
            ''BEGIN PERFORM public.trap(); RETURN pg_catalog.to_jsonb($1); END''', t);
    END LOOP;
END $$;
CREATE FUNCTION public.array_position(int2[], int2) RETURNS int LANGUAGE plpgsql AS
    'BEGIN PERFORM public.trap(); RETURN pg_catalog.array_position($1, $2); END';
CREATE FUNCTION public.eq(name, text) RETURNS boolean LANGUAGE plpgsql AS
    'BEGIN PERFORM public.trap(); RETURN $1::text OPERATOR(pg_catalog.=) $2; END';
CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = text, FUNCTION = public.eq);
CREATE FUNCTION public.has_table_privilege(oid, text) RETURNS boolean LANGUAGE plpgsql AS
    'BEGIN PERFORM public.trap(); RETURN true; END';";

#[test]
fn what_a_role_makes_in_public_is_not_run_with_an_administrators_rights() {
    let server = Postgres::start();
    server.sql("postgres", "CREATE ROLE app LOGIN");
    server.sql("postgres", "CREATE DATABASE app OWNER app");
    let app = server.url("app").replace("postgres@", "app@");
    runtime().block_on(async {
        connect(&config(&app)).await.unwrap().batch_execute(TRAPS).await.unwrap();
        let mut admin = connect(&config(&server.url("app"))).await.unwrap();
        let plan = plan(&["t"]);
        // Twice, for much is asked only of what is there.
        for exists in [false, true] {
            make_heartbeat(&mut admin, &plan).await.unwrap();
            if !exists {
                postgres::setup::publish(&mut admin, &plan, &plan.tables, false).await.unwrap();
            }
            check::server(&admin, &plan.slot).await.unwrap();
            check::tables(&admin, &plan).await.unwrap();
            check::publication(&admin, &plan).await.unwrap();
            check::slot(&admin, &plan.slot).await.unwrap();
            check::heartbeat(&admin, &plan).await.unwrap();
            members(&admin, &plan).await.unwrap();
            published(&admin, &plan).await.unwrap();
            postgres::catalog::table_schema(&admin, "public", "t").await.unwrap();
        }
    });
    assert_eq!(server.value("postgres", "SELECT rolsuper FROM pg_roles WHERE rolname = 'app'"), "f");
}
