//! What the subset refuses, at parsing or at binding, and with which remedy.

use std::fmt::Write as _;

use change::ReplicaIdentity;
use expect_test::{Expect, expect};

use super::Definition;
use super::tests::emails;

/// Each query's refusal, from parsing or from binding.
fn check_refused(identity: ReplicaIdentity, queries: &[&str], expected: Expect) {
    let schema = emails(identity);
    let mut report = String::new();
    for sql in queries {
        let refusal = match Definition::parse("c", sql).and_then(|definition| definition.bind(&schema)) {
            Err(refusal) => format!("{}\n  {}", refusal.what, refusal.remedy),
            Ok(_) => "NOT REFUSED".to_owned(),
        };
        let refusal = refusal.strip_prefix("counter \"c\": ").unwrap_or(&refusal);
        writeln!(report, "{sql}\n  {refusal}").unwrap();
    }
    expected.assert_eq(&report);
}

#[test]
fn only_the_subset_is_taken() {
    check_refused(
        ReplicaIdentity::Full,
        &[
            "",
            "SELEC 1",
            "DELETE FROM emails",
            "SELECT count(*) FROM emails; SELECT count(*) FROM emails",
            "SELECT user_id FROM emails GROUP BY user_id",
            "SELECT count(*), sum(size) FROM emails",
            "SELECT * FROM emails",
            "SELECT count(1) FROM emails",
            "SELECT count(DISTINCT user_id) FROM emails",
            "SELECT avg(size) FROM emails",
            "SELECT sum(*) FROM emails",
            "SELECT sum(size + 1) FROM emails",
            "SELECT count(*) + 1 FROM emails",
            "SELECT count(*) FILTER (WHERE is_read) FROM emails",
            "SELECT count(*) OVER () FROM emails",
            "SELECT DISTINCT count(*) FROM emails",
            "SELECT count(*) FROM emails e JOIN users u ON u.id = e.user_id",
            "SELECT count(*) FROM emails, users",
            "SELECT count(*) FROM (SELECT * FROM emails) e",
            "SELECT count(*) FROM emails TABLESAMPLE SYSTEM (10)",
            "SELECT count(*) FROM ONLY emails",
            "SELECT count(*) FROM generate_series(1, 3)",
            "SELECT count(*) FROM emails AS e(a, b)",
            "WITH e AS (SELECT 1) SELECT count(*) FROM emails",
            "SELECT count(*) FROM emails UNION SELECT 1",
            "SELECT user_id, count(*) FROM emails GROUP BY user_id HAVING count(*) > 1",
            "SELECT user_id, count(*) FROM emails GROUP BY user_id ORDER BY 1",
            "SELECT user_id, count(*) FROM emails GROUP BY user_id LIMIT 1",
            "SELECT user_id, count(*) FROM emails GROUP BY user_id FOR UPDATE",
            "SELECT user_id, count(*) FROM emails GROUP BY 1",
            "SELECT user_id, count(*) FROM emails GROUP BY lower(folder)",
            "SELECT user_id, count(*) FROM emails GROUP BY ROLLUP (user_id)",
            "SELECT user_id, count(*) FROM emails GROUP BY user_id, user_id",
            "SELECT user_id, count(*) FROM emails",
            "SELECT count(*) FROM emails GROUP BY user_id",
            "SELECT user_id, folder, count(*) FROM emails GROUP BY folder, user_id",
            "SELECT current_user, count(*) FROM emails GROUP BY current_user",
        ],
        expect![[r#"

              the query is empty
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELEC 1
              not SQL that can be read: sql parser error: Expected: an SQL statement, found: SELEC at Line: 1, Column: 1
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            DELETE FROM emails
              the statement is not a SELECT
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT count(*) FROM emails; SELECT count(*) FROM emails
              there is more than one statement
              give one query
            SELECT user_id FROM emails GROUP BY user_id
              the select list has no aggregate
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT count(*), sum(size) FROM emails
              sum(size) is a second aggregate
              define a counter of its own for each aggregate
            SELECT * FROM emails
              * in the select list is not one column
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT count(1) FROM emails
              count(1) is not supported
              give a plain column, or count(*) for rows
            SELECT count(DISTINCT user_id) FROM emails
              count(DISTINCT user_id) is not supported
              remove DISTINCT or ALL: a counter does not remember single values
            SELECT avg(size) FROM emails
              avg(size) is not supported
              use count(*), count(column) or sum(column)
            SELECT sum(*) FROM emails
              sum(*) is not supported
              use count(*), count(column) or sum(column)
            SELECT sum(size + 1) FROM emails
              sum(size + 1) is not supported
              give a plain column, or count(*) for rows
            SELECT count(*) + 1 FROM emails
              count(*) + 1 in the select list is neither a column nor an aggregate
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT count(*) FILTER (WHERE is_read) FROM emails
              count(*) FILTER (WHERE is_read) is not supported
              put the condition of FILTER into WHERE
            SELECT count(*) OVER () FROM emails
              count(*) OVER () is not supported
              remove OVER: a counter has no window
            SELECT DISTINCT count(*) FROM emails
              DISTINCT is not part of what a counter can be
              remove it; write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT count(*) FROM emails e JOIN users u ON u.id = e.user_id
              JOIN users u ON u.id = e.user_id is a join
              name one table after FROM, without a join
            SELECT count(*) FROM emails, users
              FROM names 2 tables and not one
              name one table after FROM, without a join
            SELECT count(*) FROM (SELECT * FROM emails) e
              (SELECT * FROM emails) e is not a plain table
              name one table after FROM, without a join
            SELECT count(*) FROM emails TABLESAMPLE SYSTEM (10)
              emails TABLESAMPLE SYSTEM (10) is not a plain table
              name one table after FROM, without a join
            SELECT count(*) FROM ONLY emails
              ONLY is a reserved word of SQL
              write "only" if it is a name
            SELECT count(*) FROM generate_series(1, 3)
              generate_series(1, 3) is not a plain table
              name one table after FROM, without a join
            SELECT count(*) FROM emails AS e(a, b)
              emails AS e (a, b) renames columns
              name one table after FROM, without a join
            WITH e AS (SELECT 1) SELECT count(*) FROM emails
              WITH is not part of what a counter can be
              remove it; write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT count(*) FROM emails UNION SELECT 1
              UNION is not part of what a counter can be
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT user_id, count(*) FROM emails GROUP BY user_id HAVING count(*) > 1
              HAVING count(*) > 1 is not part of what a counter can be
              remove it; write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT user_id, count(*) FROM emails GROUP BY user_id ORDER BY 1
              ORDER BY 1 is not part of what a counter can be
              remove it; write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT user_id, count(*) FROM emails GROUP BY user_id LIMIT 1
              LIMIT 1 is not part of what a counter can be
              remove it; write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT user_id, count(*) FROM emails GROUP BY user_id FOR UPDATE
              FOR UPDATE or FOR SHARE is not part of what a counter can be
              remove it; write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            SELECT user_id, count(*) FROM emails GROUP BY 1
              1 in GROUP BY is not a plain column
              list plain columns in GROUP BY, by their names
            SELECT user_id, count(*) FROM emails GROUP BY lower(folder)
              lower(folder) in GROUP BY is not a plain column
              list plain columns in GROUP BY, by their names
            SELECT user_id, count(*) FROM emails GROUP BY ROLLUP (user_id)
              ROLLUP (user_id) in GROUP BY is not a plain column
              list plain columns in GROUP BY, by their names
            SELECT user_id, count(*) FROM emails GROUP BY user_id, user_id
              user_id stands twice in GROUP BY
              list plain columns in GROUP BY, by their names
            SELECT user_id, count(*) FROM emails
              the select list has user_id but GROUP BY has no column
              name the same columns in both, in the same order: it is the order of the values in a hash field
            SELECT count(*) FROM emails GROUP BY user_id
              the select list has no column but GROUP BY has user_id
              name the same columns in both, in the same order: it is the order of the values in a hash field
            SELECT user_id, folder, count(*) FROM emails GROUP BY folder, user_id
              the select list has user_id, folder but GROUP BY has folder, user_id
              name the same columns in both, in the same order: it is the order of the values in a hash field
            SELECT current_user, count(*) FROM emails GROUP BY current_user
              current_user is not supported
              write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
        "#]],
    );
}

#[test]
fn conditions_outside_the_subset() {
    let conditions = [
        "size + 1 > 2",
        "lower(folder) = 'x'",
        "size > (SELECT 1)",
        "id IN (SELECT 1)",
        "EXISTS (SELECT 1)",
        "user_id = $1",
        "1 = 1",
        "folder ILIKE 'x'",
        "folder SIMILAR TO 'x'",
        "folder ~ 'x'",
        "folder LIKE subject",
        "folder LIKE 'x\\'",
        "folder LIKE 'x' ESCAPE '!!'",
        "folder COLLATE \"C\" < 'x'",
        "folder IS DISTINCT FROM 'x'",
        "id IN (1, size)",
        "(id, user_id) = (1, 2)",
        "CASE WHEN is_read THEN TRUE END",
        "sent_at > now()",
        "sent_at > current_timestamp",
        "folder = E'x'",
        "folder = 'x'::varchar(3)",
        "id = 5.5::bigint",
        "id = -5::bigint",
        "id = 1_000",
        "id = 0x10",
        "user_id = 40000::smallint",
        "'x'",
        "other.id = 1",
        "user = 1",
    ];
    let queries: Vec<_> =
        conditions.iter().map(|c| format!("SELECT count(*) FROM emails WHERE {c}")).collect();
    let queries: Vec<_> = queries.iter().map(String::as_str).collect();
    check_refused(
        ReplicaIdentity::Full,
        &queries,
        expect![[r#"
            SELECT count(*) FROM emails WHERE size + 1 > 2
              size + 1 is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE lower(folder) = 'x'
              lower(folder) is a function call that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE size > (SELECT 1)
              (SELECT 1) is a subquery that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE id IN (SELECT 1)
              id IN (SELECT 1) is a subquery that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE EXISTS (SELECT 1)
              EXISTS (SELECT 1) is a subquery that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE user_id = $1
              $1 is a parameter, and a counter has none
              write the value itself
            SELECT count(*) FROM emails WHERE 1 = 1
              1 = 1 compares two literals
              write TRUE or FALSE instead
            SELECT count(*) FROM emails WHERE folder ILIKE 'x'
              folder ILIKE 'x' is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE folder SIMILAR TO 'x'
              folder SIMILAR TO 'x' is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE folder ~ 'x'
              folder ~ 'x' is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE folder LIKE subject
              subject after LIKE or ESCAPE is not a plain string literal
              write the pattern as '…'
            SELECT count(*) FROM emails WHERE folder LIKE 'x\'
              the LIKE pattern 'x\' ends with its escape character
              double the escape character to match itself
            SELECT count(*) FROM emails WHERE folder LIKE 'x' ESCAPE '!!'
              ESCAPE '!!' is longer than one character
              give one character, or '' for none
            SELECT count(*) FROM emails WHERE folder COLLATE "C" < 'x'
              folder COLLATE "C" is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE folder IS DISTINCT FROM 'x'
              folder IS DISTINCT FROM 'x' is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE id IN (1, size)
              size in the IN list is not a literal
              list literals only; compare with a column by = and join with OR
            SELECT count(*) FROM emails WHERE (id, user_id) = (1, 2)
              (id, user_id) is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE CASE WHEN is_read THEN TRUE END
              CASE WHEN is_read THEN true END is an expression that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE sent_at > now()
              now() is a function call that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE sent_at > current_timestamp
              current_timestamp is a function call that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
            SELECT count(*) FROM emails WHERE folder = E'x'
              E'x' is a form of literal that a counter does not read
              write a string as '…' (a quote inside it twice) and a number with decimal digits
            SELECT count(*) FROM emails WHERE folder = 'x'::varchar(3)
              'x'::VARCHAR(3) casts to VARCHAR(3), which a counter does not support
              leave the cast out: a string literal takes the type of the column beside it; casts to boolean, smallint, integer, bigint, numeric, real, double precision, text, uuid, date, timestamp and timestamptz without a length are supported
            SELECT count(*) FROM emails WHERE id = 5.5::bigint
              '5.5' is not a value of type bigint
              write a value of type bigint in place of 5.5
            SELECT count(*) FROM emails WHERE id = -5::bigint
              -5::BIGINT is not a plain literal
              write the value itself, with at most one cast: '…'::type, CAST(-5 AS bigint)
            SELECT count(*) FROM emails WHERE id = 1_000
              1_000 is a form of literal that a counter does not read
              write a string as '…' (a quote inside it twice) and a number with decimal digits
            SELECT count(*) FROM emails WHERE id = 0x10
              X'10' is a form of literal that a counter does not read
              write a string as '…' (a quote inside it twice) and a number with decimal digits
            SELECT count(*) FROM emails WHERE user_id = 40000::smallint
              '40000' is not a value of type smallint
              write a value of type smallint in place of 40000
            SELECT count(*) FROM emails WHERE 'x'
              'x' is not a condition
              write TRUE or FALSE
            SELECT count(*) FROM emails WHERE other.id = 1
              other.id does not name a column of the table in FROM
              write the column's name alone
            SELECT count(*) FROM emails WHERE user = 1
              user is a function call that a counter's WHERE does not support
              use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table
        "#]],
    );
}

#[test]
fn h60_types_whose_comparison_is_not_ours() {
    check_refused(
        ReplicaIdentity::Full,
        &[
            "SELECT nope, count(*) FROM emails GROUP BY nope",
            "SELECT weight, count(*) FROM emails GROUP BY weight",
            "SELECT meta, count(*) FROM emails GROUP BY meta",
            "SELECT tags, count(*) FROM emails GROUP BY tags",
            "SELECT length, count(*) FROM emails GROUP BY length",
            "SELECT nick, count(*) FROM emails GROUP BY nick",
            "SELECT loose, count(*) FROM emails GROUP BY loose",
            "SELECT sum(price) FROM emails",
            "SELECT sum(folder) FROM emails",
            "SELECT count(*) FROM emails WHERE nick = 'x'",
            "SELECT count(*) FROM emails WHERE loose = 'x'",
            "SELECT count(*) FROM emails WHERE loose LIKE 'x'",
            "SELECT count(*) FROM emails WHERE subject > 'x'",
            "SELECT count(*) FROM emails WHERE subject BETWEEN 'a' AND 'b'",
            "SELECT count(*) FROM emails WHERE folder = subject",
            "SELECT count(*) FROM emails WHERE subject = code",
            "SELECT count(*) FROM emails WHERE user_id = folder",
            "SELECT count(*) FROM emails WHERE user_id = weight",
            "SELECT count(*) FROM emails WHERE weight IN (1, 2)",
            "SELECT count(*) FROM emails WHERE user_id",
            "SELECT count(*) FROM emails WHERE user_id LIKE '1%'",
            "SELECT count(*) FROM emails WHERE user_id = 'x'",
            "SELECT count(*) FROM emails WHERE user_id = '3000000000'",
            "SELECT count(*) FROM emails WHERE user_id = TRUE",
            "SELECT count(*) FROM emails WHERE folder = 1",
            "SELECT count(*) FROM emails WHERE is_read = 1",
            "SELECT count(*) FROM emails WHERE weight > 1e999",
            "SELECT count(*) FROM emails WHERE token = 'x'",
            "SELECT count(*) FROM emails WHERE day = '2024-02-30'",
            "SELECT count(*) FROM emails WHERE day = 'today'",
            "SELECT count(*) FROM emails WHERE day > TIMESTAMP '2024-01-01 00:00:00'",
            "SELECT count(*) FROM emails WHERE sent_at > '2024-01-01'",
            "SELECT count(*) FROM emails WHERE sent_at > '2024-01-01 10:00'",
            "SELECT count(*) FROM emails WHERE sent_at > DATE '2024-01-01'",
            "SELECT count(*) FROM emails WHERE sent_at > '2024-01-01 10:00 Europe/Paris'",
            "SELECT count(*) FROM emails WHERE seen_at > '2024-01-01 10:00:00+02'",
            "SELECT count(*) FROM emails WHERE seen_at > TIMESTAMPTZ '2024-01-01 10:00:00+02'",
        ],
        expect![[r#"
            SELECT nope, count(*) FROM emails GROUP BY nope
              table public.emails has no column nope
              name one of its columns: id, user_id, folder, subject, code, is_read, size, price, weight, sent_at, seen_at, day, token, meta, tags, length, nick, loose, "Odd"""
            SELECT weight, count(*) FROM emails GROUP BY weight
              GROUP BY weight groups by floating-point numbers
              group by an exact type: numeric, an integer type, or text
            SELECT meta, count(*) FROM emails GROUP BY meta
              column meta has type jsonb, which a counter does not compare
              use a column of type boolean, smallint, integer, bigint, numeric, text, character varying, character, uuid, date, timestamp or timestamptz; IS NULL and count(column) take any type
            SELECT tags, count(*) FROM emails GROUP BY tags
              column tags has type text[], which a counter does not compare
              use a column of type boolean, smallint, integer, bigint, numeric, text, character varying, character, uuid, date, timestamp or timestamptz; IS NULL and count(column) take any type
            SELECT length, count(*) FROM emails GROUP BY length
              column length has type interval, which a counter does not compare
              use a column of type boolean, smallint, integer, bigint, numeric, text, character varying, character, uuid, date, timestamp or timestamptz; IS NULL and count(column) take any type
            SELECT nick, count(*) FROM emails GROUP BY nick
              column nick has type citext, which a counter does not compare
              use a column of type boolean, smallint, integer, bigint, numeric, text, character varying, character, uuid, date, timestamp or timestamptz; IS NULL and count(column) take any type
            SELECT loose, count(*) FROM emails GROUP BY loose
              column loose has the nondeterministic collation "ci", in which equal texts may differ
              ALTER TABLE public.emails ALTER COLUMN loose TYPE text COLLATE "C"
            SELECT sum(price) FROM emails
              sum(price) adds up type numeric(10,2)
              sum a column of type smallint, integer or bigint (for money: a count of its smallest unit); sums of numeric are not supported yet
            SELECT sum(folder) FROM emails
              sum(folder) adds up type text
              sum a column of type smallint, integer or bigint (for money: a count of its smallest unit); sums of numeric are not supported yet
            SELECT count(*) FROM emails WHERE nick = 'x'
              column nick has type citext, which a counter does not compare
              use a column of type boolean, smallint, integer, bigint, numeric, text, character varying, character, uuid, date, timestamp or timestamptz; IS NULL and count(column) take any type
            SELECT count(*) FROM emails WHERE loose = 'x'
              column loose has the nondeterministic collation "ci", in which equal texts may differ
              ALTER TABLE public.emails ALTER COLUMN loose TYPE text COLLATE "C"
            SELECT count(*) FROM emails WHERE loose LIKE 'x'
              column loose has the nondeterministic collation "ci", in which equal texts may differ
              ALTER TABLE public.emails ALTER COLUMN loose TYPE text COLLATE "C"
            SELECT count(*) FROM emails WHERE subject > 'x'
              column subject is compared by order, which its collation "en_US.utf8" defines in a way that only Postgres knows
              use = , <> or IN, or: ALTER TABLE public.emails ALTER COLUMN subject TYPE character varying(200) COLLATE "C"
            SELECT count(*) FROM emails WHERE subject BETWEEN 'a' AND 'b'
              column subject is compared by order, which its collation "en_US.utf8" defines in a way that only Postgres knows
              use = , <> or IN, or: ALTER TABLE public.emails ALTER COLUMN subject TYPE character varying(200) COLLATE "C"
            SELECT count(*) FROM emails WHERE folder = subject
              columns folder and subject have different collations
              give both the same collation, or compare each with a literal
            SELECT count(*) FROM emails WHERE subject = code
              column subject of type text is compared with column code of type character
              compare columns of the same kind of type
            SELECT count(*) FROM emails WHERE user_id = folder
              column user_id of type integer is compared with column folder of type text
              compare columns of the same kind of type
            SELECT count(*) FROM emails WHERE user_id = weight
              column user_id of type integer is compared with column weight of type double precision
              compare columns of the same kind of type
            SELECT count(*) FROM emails WHERE weight IN (1, 2)
              column weight is floating-point and stands before IN
              write comparisons joined by OR: with IN, Postgres rounds the values differently
            SELECT count(*) FROM emails WHERE user_id
              column user_id stands as a condition but has type integer
              compare it with a value
            SELECT count(*) FROM emails WHERE user_id LIKE '1%'
              LIKE is applied to column user_id of type integer
              apply LIKE to text
            SELECT count(*) FROM emails WHERE user_id = 'x'
              beside column user_id: 'x' is not a value of type integer
              write a value of type integer in place of 'x'
            SELECT count(*) FROM emails WHERE user_id = '3000000000'
              beside column user_id: '3000000000' is not a value of type integer
              write a value of type integer in place of '3000000000'
            SELECT count(*) FROM emails WHERE user_id = TRUE
              beside column user_id: TRUE does not compare with type integer
              write a value of type integer in place of TRUE
            SELECT count(*) FROM emails WHERE folder = 1
              beside column folder: 1 does not compare with type text
              write a value of type text in place of 1
            SELECT count(*) FROM emails WHERE is_read = 1
              beside column is_read: 1 does not compare with type boolean
              write a value of type boolean in place of 1
            SELECT count(*) FROM emails WHERE weight > 1e999
              beside column weight: '1e999' is not a value of the floating-point type, or out of its range
              write a value of type double precision in place of 1e999
            SELECT count(*) FROM emails WHERE token = 'x'
              beside column token: 'x' is not a uuid of the form 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'
              write a value of type uuid in place of 'x'
            SELECT count(*) FROM emails WHERE day = '2024-02-30'
              beside column day: '2024-02-30' is not a date of the form '2025-01-19'
              write a value of type date in place of '2024-02-30'
            SELECT count(*) FROM emails WHERE day = 'today'
              beside column day: 'today' is not a date of the form '2025-01-19'
              write a value of type date in place of 'today'
            SELECT count(*) FROM emails WHERE day > TIMESTAMP '2024-01-01 00:00:00'
              beside column day: CAST('2024-01-01 00:00:00' AS timestamp) does not compare with type date
              write a value of type date in place of CAST('2024-01-01 00:00:00' AS timestamp)
            SELECT count(*) FROM emails WHERE sent_at > '2024-01-01'
              beside column sent_at: '2024-01-01' has no time zone, so its meaning depends on the session's TimeZone: write an offset, '2025-01-19 12:34:56Z'
              write a value of type timestamptz in place of '2024-01-01'
            SELECT count(*) FROM emails WHERE sent_at > '2024-01-01 10:00'
              beside column sent_at: '2024-01-01 10:00' has no time zone, so its meaning depends on the session's TimeZone: write an offset, '2025-01-19 12:34:56Z'
              write a value of type timestamptz in place of '2024-01-01 10:00'
            SELECT count(*) FROM emails WHERE sent_at > DATE '2024-01-01'
              beside column sent_at: CAST('2024-01-01' AS date) does not compare with type timestamptz
              write a value of type timestamptz in place of CAST('2024-01-01' AS date)
            SELECT count(*) FROM emails WHERE sent_at > '2024-01-01 10:00 Europe/Paris'
              beside column sent_at: '2024-01-01 10:00 Europe/Paris' is not a timestamptz of the form '2025-01-19 12:34:56Z'
              write a value of type timestamptz in place of '2024-01-01 10:00 Europe/Paris'
            SELECT count(*) FROM emails WHERE seen_at > '2024-01-01 10:00:00+02'
              beside column seen_at: '2024-01-01 10:00:00+02' has a time zone, which type timestamp ignores: leave it out
              write a value of type timestamp in place of '2024-01-01 10:00:00+02'
            SELECT count(*) FROM emails WHERE seen_at > TIMESTAMPTZ '2024-01-01 10:00:00+02'
              beside column seen_at: CAST('2024-01-01 10:00:00+02' AS timestamptz) does not compare with type timestamp
              write a value of type timestamp in place of CAST('2024-01-01 10:00:00+02' AS timestamptz)
        "#]],
    );
}

#[test]
fn h34_the_old_row_must_hold_every_column() {
    check_refused(
        ReplicaIdentity::Default,
        &[
            "SELECT user_id, count(*) FROM emails GROUP BY user_id",
            "SELECT count(size) FROM public.emails",
            "SELECT count(*) FROM emails WHERE folder = 'inbox'",
            "SELECT count(*) FROM emails",
            "SELECT id, count(*) FROM emails WHERE id > 5 GROUP BY id",
        ],
        expect![[r#"
            SELECT user_id, count(*) FROM emails GROUP BY user_id
              column user_id is not part of the replica identity of public.emails, so an update or a delete does not tell its old value
              ALTER TABLE public.emails REPLICA IDENTITY FULL
            SELECT count(size) FROM public.emails
              column size is not part of the replica identity of public.emails, so an update or a delete does not tell its old value
              ALTER TABLE public.emails REPLICA IDENTITY FULL
            SELECT count(*) FROM emails WHERE folder = 'inbox'
              column folder is not part of the replica identity of public.emails, so an update or a delete does not tell its old value
              ALTER TABLE public.emails REPLICA IDENTITY FULL
            SELECT count(*) FROM emails
              NOT REFUSED
            SELECT id, count(*) FROM emails WHERE id > 5 GROUP BY id
              NOT REFUSED
        "#]],
    );
    let mut schema = emails(ReplicaIdentity::Nothing);
    schema.schema = "Mail Box".to_owned();
    schema.table = "order".to_owned();
    let definition = Definition::parse("c", "SELECT count(size) FROM \"Mail Box\".\"order\"").unwrap();
    let remedy = definition.bind(&schema).unwrap_err().remedy;
    assert_eq!(remedy, "ALTER TABLE \"Mail Box\".\"order\" REPLICA IDENTITY FULL");
}
