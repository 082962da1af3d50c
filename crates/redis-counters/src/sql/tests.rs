//! What the subset takes, and what becomes of it.

use change::{Collation, Column, ReplicaIdentity, TableSchema};
use expect_test::expect;

use super::{Bound, Definition, Scratch};

const COLUMNS: &[(&str, u32, &str)] = &[
    ("id", 20, "bigint"),
    ("user_id", 23, "integer"),
    ("folder", 25, "text"),
    ("subject", 1043, "character varying(200)"),
    ("code", 1042, "character(4)"),
    ("is_read", 16, "boolean"),
    ("size", 20, "bigint"),
    ("price", 1700, "numeric(10,2)"),
    ("weight", 701, "double precision"),
    ("sent_at", 1184, "timestamp with time zone"),
    ("seen_at", 1114, "timestamp without time zone"),
    ("day", 1082, "date"),
    ("token", 2950, "uuid"),
    ("meta", 3802, "jsonb"),
    ("tags", 1009, "text[]"),
    ("length", 1186, "interval"),
    ("nick", 70_001, "citext"),
    ("loose", 25, "text"),
    ("Odd\"", 25, "text"),
];

pub(super) fn emails(identity: ReplicaIdentity) -> TableSchema {
    let column = |&(name, type_oid, type_name): &(&str, u32, &str)| {
        let collation = |name: &str, deterministic, bytewise| {
            Some(Collation { name: name.to_owned(), deterministic, bytewise })
        };
        let collation = match (name, type_oid) {
            ("folder", _) => collation("C", true, true),
            ("loose", _) => collation("ci", false, false),
            (_, 25 | 1042 | 1043 | 70_001) => collation("en_US.utf8", true, false),
            _ => None,
        };
        let (name, type_name) = (name.to_owned(), type_name.to_owned());
        Column {
            key: (name == "id").then_some(1),
            name,
            type_oid,
            type_name,
            collation,
            number: None,
            recorded: None,
        }
    };
    TableSchema {
        relation: 16_384,
        root: None,
        schema: "public".to_owned(),
        table: "emails".to_owned(),
        identity,
        columns: COLUMNS.iter().map(column).collect(),
    }
}

fn bound(sql: &str) -> Bound {
    Definition::parse("c", sql).unwrap().bind(&emails(ReplicaIdentity::Full)).unwrap()
}

#[test]
fn hash_follows_the_meaning_and_not_the_layout() {
    let hash = |sql: &str| Definition::parse("c", sql).unwrap().hash();
    let base = hash(
        "SELECT user_id, count(*) FROM public.emails WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id",
    );
    let same = [
        "select User_Id , COUNT( * ) as n\nfrom EMAILS e -- unread\nwhere ((not (e.IS_READ)) and folder='inbox') \
         group by \"user_id\";",
        "SELECT count(*), emails.user_id FROM emails WHERE NOT public.emails.is_read AND (folder) = ('inbox') \
         GROUP BY (user_id)",
    ];
    for same in same {
        assert_eq!(hash(same), base, "{same}");
    }
    let others = [
        "SELECT user_id, count(size) FROM emails WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id",
        "SELECT user_id, count(*) FROM emails WHERE NOT is_read AND folder = 'Inbox' GROUP BY user_id",
        "SELECT user_id, count(*) FROM emails WHERE NOT (is_read AND folder = 'inbox') GROUP BY user_id",
        "SELECT user_id, count(*) FROM other.emails WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id",
        "SELECT user_id, count(*) FROM emails GROUP BY user_id",
    ];
    for other in others {
        assert_ne!(hash(other), base, "{other}");
    }
}

#[test]
fn the_hash_stays_from_release_to_release() {
    let definition = Definition::parse(
        "unread",
        "SELECT user_id, count(*) FROM public.emails WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id",
    );
    expect!["c1a2a90a5fcd566359dec2f51129ff97"].assert_eq(&definition.unwrap().hash());
}

#[test]
fn names_and_parts() {
    let definition = Definition::parse(
        "c",
        "SELECT user_id, sum(size) FROM emails WHERE size > 1 AND folder = 'x' GROUP BY user_id",
    );
    let definition = definition.unwrap();
    assert_eq!((definition.name(), definition.table()), ("c", ("public", "emails")));
    assert_eq!(definition.referenced_columns(), ["user_id", "size", "folder"]);
    assert!(definition.grouped());
    assert!(!Definition::parse("c", "SELECT count(*) FROM mail.emails").unwrap().grouped());
}

#[test]
fn the_query_for_postgres() {
    let bound = bound(
        "SELECT user_id, is_read, price, code, sum(size) FROM emails e WHERE e.folder NOT LIKE 'a!_%' ESCAPE '!' \
         AND (size BETWEEN -5 AND 10 OR price IN (1, 2.50, NULL)) AND (is_read IS NOT TRUE) AND \"Odd\"\"\" = 'it''s' \
         AND day > DATE '2024-01-01' GROUP BY user_id, is_read, price, code",
    );
    expect![[r#"SELECT "user_id"::text, left("is_read"::text, 1), "price"::text, textin(bpcharout("code")), count(*)::text, count("size")::text, sum("size")::text FROM public.emails WHERE ("folder" NOT LIKE 'a!_%' ESCAPE '!') AND (("size" BETWEEN -5 AND 10) OR ("price" IN (1, 2.50, NULL))) AND (("is_read") IS NOT TRUE) AND ("Odd""" = 'it''s') AND ("day" > CAST('2024-01-01' AS date)) GROUP BY "user_id", "is_read", "price", "code""#]].assert_eq(&bound.select_sql("public.emails"));
}

#[test]
fn long_chains_do_not_overflow_the_stack() {
    let conditions = [
        ["is_read"; 2_000].join(" AND "),
        ["is_read"; 2_000].join(" OR "),
        "is_read".to_owned() + &" IS TRUE".repeat(1_900),
    ];
    for condition in conditions {
        // Either answer is good, a crash is not.
        let _ = Definition::parse("c", &format!("SELECT count(*) FROM emails WHERE {condition}"));
    }
}

#[test]
fn a_row_that_is_none_is_an_error() {
    let bound = bound("SELECT user_id, sum(size) FROM emails WHERE is_read GROUP BY user_id");
    let mut scratch = Scratch::default();
    let mut check = |row: &str| {
        bound
            .contribution(row, &mut scratch)
            .map(|found| found.map(|c| (c.group.to_owned(), c.non_null, c.amount)))
    };
    assert_eq!(check(r#"{"user_id":7,"size":null,"is_read":true}"#), Ok(Some(("7".to_owned(), false, 0))));
    assert_eq!(
        check(r#"{"size":-3,"x":[1],"user_id":null,"is_read":true}"#),
        Ok(Some(("\\N".to_owned(), true, -3)))
    );
    assert_eq!(check(r#"{"user_id":7,"size":5,"is_read":null}"#), Ok(None));
    for bad in [
        r#"{"user_id":7,"is_read":true}"#,
        r#"{"user_id":7,"size":"__debezium_unavailable_value","is_read":true}"#,
        "[]",
    ] {
        assert!(check(bad).is_err(), "{bad}");
    }
}
