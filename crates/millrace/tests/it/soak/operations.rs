//! Tables, stores, and the operations of the workload.

use rand::Rng;
use rand::rngs::StdRng;

pub(super) const TABLES: [&str; 5] =
    ["public.item", "shop.feeling", "public.keyed", "public.loose", "public.p"];

pub(super) const SCHEMA: &str = "
    CREATE SCHEMA shop;
    CREATE TYPE mood AS ENUM ('sad', 'so', 'happy');
    CREATE TYPE pair AS (x int, y text);
    CREATE TABLE item (id int PRIMARY KEY, a text, b text, n int, at timestamptz, pad text);
    ALTER TABLE item REPLICA IDENTITY FULL;
    CREATE TABLE spare (LIKE item INCLUDING ALL);
    ALTER TABLE spare REPLICA IDENTITY FULL;
    INSERT INTO spare VALUES (1, 'spare', 'spare', 1, now(), '');
    CREATE TABLE shop.feeling (id int PRIMARY KEY, m mood, c pair, a text, up text GENERATED ALWAYS AS (upper(a)) STORED);
    ALTER TABLE shop.feeling REPLICA IDENTITY FULL;
    CREATE TABLE keyed (id int PRIMARY KEY, other int NOT NULL CONSTRAINT keyed_other UNIQUE, v text);
    CREATE TABLE loose (id int CONSTRAINT loose_key PRIMARY KEY, v text, n int);
    ALTER TABLE loose REPLICA IDENTITY FULL;
    CREATE TABLE p (id int, k int, v text, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
    CREATE TABLE p0 PARTITION OF p FOR VALUES IN (0);
    CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
    CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
    ALTER TABLE p0 REPLICA IDENTITY FULL;
    ALTER TABLE p1 REPLICA IDENTITY FULL;
    ALTER TABLE p2 REPLICA IDENTITY FULL;";

/// Counters, and the queries that they equal.
pub(super) const COUNTERS: [(&str, &str); 8] = [
    ("item_a", "SELECT a, count(*) FROM public.item GROUP BY a"),
    ("item_n", "SELECT b, sum(n) FROM public.item GROUP BY b"),
    ("item_at", "SELECT at, count(*) FROM public.item GROUP BY at"),
    ("feeling", "SELECT a, count(m) FROM shop.feeling GROUP BY a"),
    ("keyed", "SELECT count(*) FROM public.keyed"),
    ("loose", "SELECT v, sum(n) FROM public.loose GROUP BY v"),
    ("parts", "SELECT k, count(*) FROM public.p GROUP BY k"),
    ("values", "SELECT v, sum(id) FROM public.p GROUP BY v"),
];

/// Indexes (none of `keyed`: an index stops where the columns of its table's key change): the query that their documents equal, and what the configuration says of them.
pub(super) const INDEXES: [(&str, &str, &str); 2] = [
    (
        "item",
        "SELECT id, a, b, n FROM public.item",
        "table = \"public.item\"\ntext = [\"a\"]\nexact = [\"b\"]\nnumber = [\"n\"]",
    ),
    ("feeling", "SELECT id, m, c FROM shop.feeling", "table = \"shop.feeling\"\nexact = [\"m\", \"c\"]"),
];

/// What may become of the reader by an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// It must go on.
    Never,
    /// It may end with exit code 3. The operation has undone itself by its end; then `setup` and a start mend it.
    Undone,
    /// It must end with exit code 3, and only a new log mends it.
    NewLog,
}

/// A line of an operation: what follows waits until all stores are ready.
pub(super) const READY: &str = "-- ready";

/// Something that is done to a table.
pub(super) struct Operation {
    pub(super) what: &'static str,
    /// Place in [`TABLES`].
    pub(super) table: usize,
    /// A transaction a line, or [`READY`]; `$N` is a number that no operation had before, `$W` a random change of the
    /// table.
    pub(super) sql: &'static str,
    pub(super) refusal: Refusal,
    /// What follows it must not be another change until the log has it: no row event of the table shows it.
    pub(super) unseen: bool,
}

const fn may(table: usize, what: &'static str, sql: &'static str) -> Operation {
    Operation { what, table, sql, refusal: Refusal::Never, unseen: false }
}

const fn unseen(table: usize, what: &'static str, sql: &'static str) -> Operation {
    Operation { unseen: true, ..may(table, what, sql) }
}

const fn refused(table: usize, what: &'static str, sql: &'static str) -> Operation {
    Operation { refusal: Refusal::Undone, ..may(table, what, sql) }
}

const fn hidden(table: usize, what: &'static str, sql: &'static str) -> Operation {
    Operation { refusal: Refusal::Undone, ..unseen(table, what, sql) }
}

const ITEM: usize = 0;
const FEELING: usize = 1;
const KEYED: usize = 2;
const LOOSE: usize = 3;
const PARTS: usize = 4;

pub(super) const OPERATIONS: [Operation; 50] = [
    may(ITEM, "column added", "ALTER TABLE item ADD x$N int"),
    may(
        ITEM,
        "column added with a default",
        "ALTER TABLE item ADD x$N text DEFAULT 'd'; $W
         ALTER TABLE item DROP x$N",
    ),
    may(ITEM, "column dropped and added", "$W ALTER TABLE item DROP a; ALTER TABLE item ADD a text; $W"),
    unseen(
        ITEM,
        "column dropped, then added",
        // Rows that are read without the column stop its stores for good.
        "-- ready
         ALTER TABLE item DROP b
         ALTER TABLE item ADD b text",
    ),
    may(
        ITEM,
        "columns swapped",
        "$W ALTER TABLE item RENAME a TO t; ALTER TABLE item RENAME b TO a; ALTER TABLE item RENAME t TO b; $W",
    ),
    may(
        ITEM,
        "column renamed and renamed back",
        "ALTER TABLE item RENAME a TO t; UPDATE item SET t = 'renamed' WHERE id = 3; ALTER TABLE item RENAME t TO a",
    ),
    may(
        ITEM,
        "column expanded and contracted",
        "ALTER TABLE item ADD n2 int
         UPDATE item SET n2 = n * 100
         ALTER TABLE item DROP n; ALTER TABLE item RENAME n2 TO n",
    ),
    may(ITEM, "text to varchar", "ALTER TABLE item ALTER a TYPE varchar(40)"),
    may(ITEM, "varchar to text", "ALTER TABLE item ALTER a TYPE text"),
    may(
        ITEM,
        "text to char",
        "$W ALTER TABLE item ALTER b TYPE char(8); $W
         ALTER TABLE item ALTER b TYPE text",
    ),
    may(
        ITEM,
        "int to bigint",
        "ALTER TABLE item ALTER n TYPE bigint; $W
         ALTER TABLE item ALTER n TYPE int",
    ),
    may(ITEM, "rewritten with other values", "$W ALTER TABLE item ALTER n TYPE int USING n + 7; $W"),
    may(ITEM, "rewritten to upper case", "ALTER TABLE item ALTER a TYPE text USING upper(a)"),
    may(
        ITEM,
        "timestamptz to timestamp",
        "ALTER TABLE item ALTER at TYPE timestamp; $W
         ALTER TABLE item ALTER at TYPE timestamptz",
    ),
    may(ITEM, "vacuum full", "VACUUM FULL item"),
    may(ITEM, "cluster", "CLUSTER item USING item_pkey"),
    may(ITEM, "truncate", "TRUNCATE item; $W $W $W"),
    may(ITEM, "truncated in the middle", "$W $W TRUNCATE item; $W ALTER TABLE item ADD x$N int; $W"),
    may(
        ITEM,
        "renamed within a transaction",
        "$W ALTER TABLE item RENAME TO other; UPDATE other SET a = 'while renamed' WHERE id < 4; \
         ALTER TABLE other RENAME TO item",
    ),
    refused(
        ITEM,
        "renamed",
        "ALTER TABLE item RENAME TO other
         UPDATE other SET a = 'while renamed' WHERE id < 4
         ALTER TABLE other RENAME TO item",
    ),
    may(
        ITEM,
        "swapped within a transaction",
        "ALTER TABLE item RENAME TO t; ALTER TABLE spare RENAME TO item; UPDATE item SET n = n + 1; \
         UPDATE t SET n = n + 1; ALTER TABLE item RENAME TO spare; ALTER TABLE t RENAME TO item",
    ),
    hidden(
        ITEM,
        "swapped",
        "ALTER TABLE item RENAME TO t; ALTER TABLE spare RENAME TO item; ALTER TABLE t RENAME TO spare
         UPDATE spare SET n = n + 1
         ALTER TABLE item RENAME TO t; ALTER TABLE spare RENAME TO item; ALTER TABLE t RENAME TO spare",
    ),
    Operation {
        refusal: Refusal::NewLog,
        ..unseen(
            ITEM,
            "replaced",
            "CREATE TABLE item_$N (LIKE item INCLUDING ALL); ALTER TABLE item_$N REPLICA IDENTITY FULL; \
             INSERT INTO item_$N SELECT * FROM item WHERE id % 2 = 0; DROP TABLE item; \
             ALTER TABLE item_$N RENAME TO item; ALTER INDEX item_$N_pkey RENAME TO item_pkey",
        )
    },
    hidden(
        ITEM,
        "taken out and put back",
        "ALTER PUBLICATION millrace_mailbox DROP TABLE item
         $W
         ALTER PUBLICATION millrace_mailbox ADD TABLE item",
    ),
    may(
        ITEM,
        "taken out and put back within a transaction",
        "$W ALTER PUBLICATION millrace_mailbox DROP TABLE item; $W \
         ALTER PUBLICATION millrace_mailbox ADD TABLE item; $W",
    ),
    refused(
        ITEM,
        "inserts only",
        "ALTER PUBLICATION millrace_mailbox SET (publish = 'insert')
         $W
         ALTER PUBLICATION millrace_mailbox SET (publish = 'insert, update, delete, truncate')",
    ),
    may(
        ITEM,
        "inserts only within a transaction",
        "ALTER PUBLICATION millrace_mailbox SET (publish = 'insert'); $W \
         ALTER PUBLICATION millrace_mailbox SET (publish = 'insert, update, delete, truncate')",
    ),
    hidden(
        KEYED,
        "filtered",
        "ALTER PUBLICATION millrace_mailbox DROP TABLE keyed; \
         ALTER PUBLICATION millrace_mailbox ADD TABLE keyed WHERE (id > 5)
         INSERT INTO keyed SELECT 1 + coalesce(max(id), 0), 1 + coalesce(max(other), 0), 'f' FROM keyed
         ALTER PUBLICATION millrace_mailbox DROP TABLE keyed; \
         ALTER PUBLICATION millrace_mailbox ADD TABLE keyed",
    ),
    may(
        FEELING,
        "schema renamed within a transaction",
        "ALTER SCHEMA shop RENAME TO mall; UPDATE mall.feeling SET a = 'mall'; ALTER SCHEMA mall RENAME TO shop",
    ),
    refused(
        FEELING,
        "schema renamed",
        "ALTER SCHEMA shop RENAME TO mall
         UPDATE mall.feeling SET m = 'so'
         ALTER SCHEMA mall RENAME TO shop",
    ),
    may(FEELING, "label added", "ALTER TYPE mood ADD VALUE 'more$N'"),
    may(
        FEELING,
        "label renamed",
        "ALTER TYPE mood RENAME VALUE 'happy' TO 'glad'
         ALTER TYPE mood RENAME VALUE 'glad' TO 'happy'",
    ),
    may(
        FEELING,
        "labels swapped",
        "$W ALTER TYPE mood RENAME VALUE 'sad' TO 't'; ALTER TYPE mood RENAME VALUE 'so' TO 'sad'; $W \
         ALTER TYPE mood RENAME VALUE 't' TO 'so'",
    ),
    may(
        FEELING,
        "attribute added",
        "ALTER TYPE pair ADD ATTRIBUTE z int
         ALTER TYPE pair DROP ATTRIBUTE z",
    ),
    may(FEELING, "attribute renamed", "ALTER TYPE pair RENAME ATTRIBUTE y TO t; ALTER TYPE pair RENAME ATTRIBUTE t TO y"),
    may(
        FEELING,
        "generated column made plain",
        "ALTER TABLE shop.feeling ALTER up DROP EXPRESSION
         UPDATE shop.feeling SET up = 'plain'
         ALTER TABLE shop.feeling DROP up; ALTER TABLE shop.feeling ADD up text GENERATED ALWAYS AS (upper(a)) STORED",
    ),
    may(KEYED, "identity full", "ALTER TABLE keyed REPLICA IDENTITY FULL"),
    may(KEYED, "identity default", "$W ALTER TABLE keyed REPLICA IDENTITY DEFAULT; $W"),
    may(KEYED, "identity by index", "ALTER TABLE keyed REPLICA IDENTITY USING INDEX keyed_other"),
    may(KEYED, "truncate of a keyed table", "TRUNCATE keyed; INSERT INTO keyed VALUES (1, 1, 'first')"),
    may(
        LOOSE,
        "key dropped and added",
        "ALTER TABLE loose DROP CONSTRAINT loose_key
         $W
         ALTER TABLE loose ADD CONSTRAINT loose_key PRIMARY KEY (id)",
    ),
    may(
        LOOSE,
        "another key",
        "ALTER TABLE loose ADD y$N int NOT NULL DEFAULT 0, DROP CONSTRAINT loose_key, \
         ADD CONSTRAINT loose_key PRIMARY KEY (y$N, id); $W
         ALTER TABLE loose DROP CONSTRAINT loose_key, DROP y$N, ADD CONSTRAINT loose_key PRIMARY KEY (id)",
    ),
    unseen(
        PARTS,
        "partition made and filled",
        "CREATE TABLE p$N PARTITION OF p FOR VALUES IN ($N); ALTER TABLE p$N REPLICA IDENTITY FULL; \
         INSERT INTO p SELECT g, $N, 'made' FROM generate_series(1, 300) g
         DELETE FROM p WHERE k = $N AND id > 3",
    ),
    unseen(PARTS, "partition dropped", "DROP TABLE IF EXISTS p2
         CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2); ALTER TABLE p2 REPLICA IDENTITY FULL; $W"),
    unseen(
        PARTS,
        "partition detached, written, attached",
        "ALTER TABLE p DETACH PARTITION p1
         DELETE FROM p1 WHERE id > 100; UPDATE p1 SET v = 'detached', id = id + 100
         ALTER TABLE p ATTACH PARTITION p1 FOR VALUES IN (1)",
    ),
    unseen(
        PARTS,
        "table attached",
        "CREATE TABLE p$N (LIKE p INCLUDING ALL); ALTER TABLE p$N REPLICA IDENTITY FULL; \
         INSERT INTO p$N VALUES (1, $N, 'attached'); ALTER TABLE p ATTACH PARTITION p$N FOR VALUES IN ($N)
         DROP TABLE p$N",
    ),
    unseen(PARTS, "partition emptied", "TRUNCATE p0; $W"),
    unseen(
        PARTS,
        "partition unlogged for a while",
        "ALTER TABLE p0 SET UNLOGGED
         UPDATE p SET v = 'unlogged' WHERE k = 0
         ALTER TABLE p0 SET LOGGED",
    ),
    unseen(PARTS, "column of all partitions added", "ALTER TABLE p ADD x$N int DEFAULT 4"),
    unseen(PARTS, "all partitions rewritten", "$W ALTER TABLE p ALTER v TYPE text USING v || '!'; $W"),
];

/// A random change of a table.
pub(super) fn change(rng: &mut StdRng, table: usize) -> String {
    let id = rng.random_range(1..11);
    let n = rng.random_range(0..5);
    let label = ["NULL", "'a'", "'b:\\'", "'c'"][rng.random_range(0..4)];
    match (table, rng.random_range(0..4)) {
        (ITEM, 0) => format!(
            "DELETE FROM item WHERE id = {id}; \
             INSERT INTO item (id, a, b, n, at) VALUES ({id}, {label}, 'b{n}', {n}, '2026-01-0{} 10:00:00Z');",
            n + 1
        ),
        (ITEM, 1) => format!("UPDATE item SET a = {label}, n = n + {n} WHERE id > {id};"),
        (ITEM, 2) => format!(
            "UPDATE item SET id = id + 20 WHERE id = {id} AND NOT EXISTS (SELECT FROM item WHERE id = {id} + 20); \
             UPDATE item SET pad = (SELECT string_agg(md5(g::text), '') FROM generate_series(1, 500) g) WHERE id > {id};"
        ),
        (ITEM, _) => {
            format!("UPDATE item SET b = {label} WHERE id = {id}; DELETE FROM item WHERE id = {n} + 20;")
        }
        (FEELING, 0) => {
            format!("UPDATE shop.feeling SET m = 'happy', c = ROW({n}, {label}) WHERE id = {id};")
        }
        (FEELING, 1) => format!("DELETE FROM shop.feeling WHERE id = {id};"),
        (FEELING, _) => format!(
            "DELETE FROM shop.feeling WHERE id = {id}; \
             INSERT INTO shop.feeling (id, m, a) VALUES ({id}, (enum_range(NULL::mood))[{n}], {label});"
        ),
        (KEYED, 0) => format!("UPDATE keyed SET v = {label} WHERE id = {id};"),
        (KEYED, 1) => format!(
            "UPDATE keyed SET id = id + 20 WHERE id = {id}; DELETE FROM keyed WHERE id > 20;"
        ),
        (KEYED, 2) => "UPDATE keyed SET other = (SELECT 1 + max(other) FROM keyed) WHERE id = (SELECT max(id) FROM keyed);"
            .to_owned(),
        (KEYED, _) => format!(
            "INSERT INTO keyed SELECT {id}, 1 + coalesce(max(other), 0), 'new' FROM keyed ON CONFLICT DO NOTHING;"
        ),
        (LOOSE, 0) => format!("UPDATE loose SET v = {label}, n = n + 1 WHERE id <= {id};"),
        (LOOSE, 1) => format!("DELETE FROM loose WHERE id = {id};"),
        (LOOSE, _) => format!(
            "DELETE FROM loose WHERE id = {id}; INSERT INTO loose (id, v, n) VALUES ({id}, {label}, {n});"
        ),
        (_, 0) => format!("DELETE FROM p WHERE id = {id};"),
        (_, 1) => format!(
            "UPDATE p SET k = 1 - k, v = {label} WHERE id = {id} AND k < 2 AND NOT EXISTS (SELECT FROM p o WHERE o.id = {id} AND o.k = 1 - p.k);"
        ),
        (_, _) => format!(
            "INSERT INTO p VALUES ({id}, {n} % 3, 'v{n}') ON CONFLICT (id, k) DO UPDATE SET v = {label};"
        ),
    }
}

/// A change of a table that has a row event whatever rows there are, and leaves them as they were.
pub(super) fn touch(table: usize) -> String {
    let (table, columns, values) = match table {
        KEYED => (TABLES[KEYED], "id, other", "0, 0"),
        PARTS => (TABLES[PARTS], "id, k", "0, 0"),
        _ => (TABLES[table], "id", "0"),
    };
    format!("INSERT INTO {table} ({columns}) VALUES ({values}); DELETE FROM {table} WHERE id = 0;")
}

/// Counters' and indexes' part of the configuration.
pub(super) fn stores() -> String {
    let counter = |(name, sql): &(&str, &str)| format!("[counters.{name}]\nsql = \"{sql}\"\n");
    let index = |(name, _, fields): &(&str, &str, &str)| format!("[search.indexes.{name}]\n{fields}\n");
    let counters: String = COUNTERS.iter().map(counter).collect();
    counters + &INDEXES.iter().map(index).collect::<String>()
}
