//! The evaluation of counters against a real Postgres: random rows, random queries of the subset.
//!
//! For each query the same rows are counted three times: by Postgres, from the query as it is written; by
//! [`Bound::contribution`] over the rows in the log's form; and by Postgres again from [`Bound::select_sql`], over
//! the table and over JSON. All must agree, and what Postgres rejects must be refused.
//!
//! `MILLRACE_SQL_SEED=n` replays the one table and its queries that a failure names; `MILLRACE_SQL_TABLES=n` sets
//! how many tables a run tries.

mod author;
mod groups;
mod rows;

use std::collections::BTreeMap;

use change::{Event, RecordBatch};
use rand::prelude::*;
use redis_counters::sql::{Aggregate, Bound, Definition, Scratch};
use testkit::services::{Postgres, Rows, Session};

use author::{Author, Query};
use rows::{Family as K, ROWS, Spec, create_table, ident, log_of, schema};

const TABLES: u64 = 10;
const QUERIES: usize = 300;

/// Group to (rows, non-null values, sum).
type Answer = BTreeMap<String, (i128, i128, Option<i128>)>;

/// Of rows that end with count, count of non-nulls, and sum.
fn answer_of(rows: &Rows) -> Answer {
    let number =
        |text: &Option<String>| text.as_deref().map(|text| text.parse::<i128>().expect("an integer"));
    let entry = |row: &Vec<Option<String>>| {
        let (group, counts) = row.split_at(row.len() - 3);
        let field = change::key::join(group.iter().map(Option::as_deref));
        (
            field,
            (number(&counts[0]).expect("a count"), number(&counts[1]).expect("a count"), number(&counts[2])),
        )
    };
    rows.iter().map(entry).collect()
}

/// What Postgres says of the query's own text. The texts of groups are made here, not by the code under test.
fn oracle(query: &Query) -> String {
    let text = |spec: &&Spec| match spec.kind {
        K::Boolean => format!("CASE {0} WHEN TRUE THEN 't' WHEN FALSE THEN 'f' END", ident(spec.name)),
        K::Numeric if !spec.definition.contains('(') => format!("trim_scale({})::text", ident(spec.name)),
        K::Char => format!("CASE WHEN {0} IS NOT NULL THEN format('%s', {0}) END", ident(spec.name)),
        _ => format!("{}::text", ident(spec.name)),
    };
    let groups: String = query.group.iter().map(|spec| text(spec) + ", ").collect();
    let non_null = query.measured.as_ref().map_or("count(*)".to_owned(), |name| format!("count({name})"));
    let sum = match &query.measured {
        Some(name) if query.sums => format!("sum({name})"),
        _ => "NULL".to_owned(),
    };
    let names: Vec<_> = query.group.iter().map(|spec| ident(spec.name)).collect();
    let by = if names.is_empty() { String::new() } else { format!(" GROUP BY {}", names.join(", ")) };
    format!("SELECT {groups}count(*), {non_null}, {sum} FROM {}{}{by}", query.from, query.condition)
}

/// Postgres's answers to the oracle's query, which are held against those to the query as it is written, and to
/// `select_sql`; all in one message.
fn ask(session: &Session, query: &Query, select: &str) -> Result<(Rows, Rows), tokio_postgres::Error> {
    const NEXT: &str = "-- next --";
    let message = [oracle(query), query.sql.clone(), select.to_owned()].join(&format!("; SELECT '{NEXT}'; "));
    let answers = session.try_sql(&message)?;
    let mut answers = answers.split(|row| row[0].as_deref() == Some(NEXT));
    let mut next = || answers.next().expect("an answer to each").to_vec();
    let (expected, written, selected) = (next(), next(), next());

    let groups = query.group.len();
    let shown = match (&query.measured, query.sums) {
        (None, _) => groups,
        (Some(_), false) => groups + 1,
        (Some(_), true) => groups + 2,
    };
    let sorted = |rows: &Rows, place: usize| {
        let mut values: Vec<_> = rows.iter().map(|row| row[place].clone()).collect();
        values.sort();
        values
    };
    assert_eq!(sorted(&expected, shown), sorted(&written, query.place), "the oracle itself: {}", query.sql);
    Ok((expected, selected))
}

/// The contributions of all rows of the log, summed.
fn evaluated(bound: &Bound, log: &RecordBatch) -> Answer {
    let sums = matches!(bound.definition().aggregate(), Aggregate::Sum { .. });
    let mut answer = Answer::new();
    if !bound.definition().grouped() {
        answer.insert(String::new(), (0, 0, None));
    }
    let mut scratch = Scratch::default();
    for record in log.iter() {
        let row = Event::decode(record.value).expect("an envelope").after.expect("a row");
        let Some(contribution) = bound.contribution(row, &mut scratch).expect("a good row") else { continue };
        let entry = answer.entry(contribution.group.to_owned()).or_insert((0, 0, None));
        entry.0 += 1;
        if contribution.non_null {
            entry.1 += 1;
            if sums {
                *entry.2.get_or_insert(0) += contribution.amount;
            }
        }
    }
    answer
}

#[derive(Default, Debug)]
struct Tally {
    equal: usize,
    refused: usize,
    rejected_by_both: usize,
    non_trivial: usize,
}

/// All queries of one seed.
fn run_seed(session: &Session, seed: u64, tally: &mut Tally) {
    let mut rng = StdRng::seed_from_u64(seed);
    create_table(session, &mut rng);
    let schema = schema();
    let log = log_of(session, &schema);
    for number in 0..QUERIES {
        let alias = *[None, None, Some("m")].choose(&mut rng).expect("there is one");
        let query = Author { rng: &mut rng, alias }.query();
        let context = || format!("query {number} of MILLRACE_SQL_SEED={seed}: {}", query.sql);
        let bound = Definition::parse("c", &query.sql).and_then(|definition| definition.bind(&schema));
        let select = match &bound {
            Ok(bound) => bound.select_sql("public.mails"),
            Err(_) => "SELECT 1".to_owned(),
        };
        let asked = ask(session, &query, &select);
        let bound = match bound {
            Ok(bound) => bound,
            Err(refusal) => {
                if std::env::var_os("MILLRACE_SQL_REFUSALS").is_some() {
                    println!("{}\n  {refusal}", query.sql);
                }
                tally.refused += usize::from(asked.is_ok());
                tally.rejected_by_both += usize::from(asked.is_err());
                continue;
            }
        };
        let (expected, selected) =
            asked.unwrap_or_else(|error| panic!("Postgres rejects what we take: {error:?}\n{}", context()));
        let expected = answer_of(&expected);
        assert_eq!(evaluated(&bound, &log), expected, "evaluated: {}", context());
        assert_eq!(answer_of(&selected), expected, "select_sql: {}\n{select}", context());
        if number % 10 == 0 {
            let json = "jsonb_populate_recordset(NULL::public.mails, (SELECT jsonb_agg(to_jsonb(x)) FROM mails x)) AS mails";
            let rows = session.sql(&bound.select_sql(json));
            assert_eq!(answer_of(&rows), expected, "select_sql over JSON: {}", context());
        }
        tally.equal += 1;
        let counted: i128 = expected.values().map(|(rows, ..)| rows).sum();
        tally.non_trivial += usize::from(counted > 0 && counted < ROWS as i128);
    }
}

#[test]
fn random_queries_agree_with_postgres() {
    let server = Postgres::start();
    let session = server.session("postgres");
    session.sql("SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET extra_float_digits = 1");
    let from_env = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let mut tally = Tally::default();
    match from_env("MILLRACE_SQL_SEED") {
        Some(seed) => run_seed(&session, seed, &mut tally),
        None => {
            for _ in 0..from_env("MILLRACE_SQL_TABLES").unwrap_or(TABLES) {
                run_seed(&session, rand::rng().random_range(0..1_000_000_000), &mut tally);
            }
        }
    }
    println!("{tally:?}");
    // The generator must not drift into what is refused or trivial, or the test would prove nothing.
    let total = tally.equal + tally.refused + tally.rejected_by_both;
    assert!(tally.equal * 2 > total, "few queries were compared: {tally:?}");
    assert!(
        tally.non_trivial * 3 > tally.equal,
        "few answers were between nothing and everything: {tally:?}"
    );
}
