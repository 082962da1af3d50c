//! `millrace check`: everything a pipeline rests on, each thing that is not so with its remedy.

use std::path::Path;

use change::{Refusal, TableSchema};
use kafka::{Connection, KafkaError, Names};
use postgres::check::{self, Finding, Verdict};
use postgres::plan::{Plan, Table};
use postgres::setup::SetupError;
use serde::Serialize;
use tokio_postgres::Client;

use crate::cli::Format;
use crate::failure::{Failure, Outcome};
use crate::wiring::{FIRST_GENERATION, Process};

/// Findings about one of the systems.
pub(crate) struct Section {
    pub(crate) about: &'static str,
    pub(crate) findings: Vec<Finding>,
}

/// Looks at everything and prints it.
pub(crate) fn execute(process: &Process, format: Format) -> Outcome {
    let Looked { mut sections, source, generation } = before_setup(process)?;
    if let (Some(client), Some(generation)) = (source, generation) {
        sections.extend(of_pipeline(process, &client, generation)?);
    }
    if format.json {
        print_json(&sections)
    } else {
        print_table(&sections)
    }
    let wrong = sections.iter().flat_map(|s| &s.findings).any(|finding| finding.verdict == Verdict::Wrong);
    // Each has been printed with its remedy.
    if wrong { Err(Failure::Refused(Vec::new())) } else { Ok(()) }
}

/// What `setup` made, or whether it can.
fn of_pipeline(process: &Process, client: &Client, generation: Option<u32>) -> Result<Vec<Section>, Failure> {
    let plan = process.plan(generation.unwrap_or(FIRST_GENERATION))?;
    let Some(generation) = generation else {
        let what = format!("pipeline {} is not set up yet", plan.pipeline);
        let mut findings = vec![Finding::advice(what, "millrace setup")];
        // An error is a table that is missing or unreadable, which was said above.
        let large = process.runtime.block_on(check::too_large(client, &plan, &plan.tables));
        findings.extend(large.unwrap_or_default());
        findings.extend(widest_rows(process, client, &plan, u64::from(kafka::RECORD_MAX_BYTES)));
        return Ok(vec![Section { about: "pipeline", findings }]);
    };
    let names = Names::new(&plan.pipeline, generation)?;
    let kafka = process.kafka_briefly()?;
    let mut topics = of_problems(&kafka, kafka::check_topics(&kafka, &names)?);
    if let Ok(Some(record_max)) = kafka::record_max(&kafka, &names) {
        topics.extend(widest_rows(process, client, &plan, record_max as u64));
    }
    let objects = process.runtime.block_on(objects(client, &plan)).unwrap_or_else(|e| vec![unreachable(&e)]);
    Ok(vec![Section { about: "topics", findings: topics }, Section { about: "pipeline", findings: objects }])
}

/// The largest records that the tables will have, which the log must take.
fn widest_rows(process: &Process, client: &Client, plan: &Plan, record_max: u64) -> Vec<Finding> {
    let omits = |table: &Table| process.config.postgres.omit.contains(table);
    process.runtime.block_on(postgres::widest_rows(client, plan, record_max, omits))
}

/// What was found before the pipeline's own objects were looked at.
pub(crate) struct Looked {
    pub(crate) sections: Vec<Section>,
    /// Where Postgres answers.
    source: Option<Client>,
    /// Where Kafka answers: the current generation, if the pipeline is set up.
    generation: Option<Option<u32>>,
}

/// What must hold before anything is made: the server, the tables, the stores' definitions, Kafka, Redis, the disk.
pub(crate) fn before_setup(process: &Process) -> Result<Looked, Failure> {
    let plan = process.plan(FIRST_GENERATION)?;
    let (source, findings) = match process.connect(&process.source()?) {
        Ok(client) => {
            let findings = process.runtime.block_on(source(process, &client, &plan));
            (Some(client), findings.unwrap_or_else(|e| vec![unreachable(&e)]))
        }
        Err(failure) => (None, vec![of_failure(failure)]),
    };
    let mut sections = vec![Section { about: "postgres", findings }];
    let (generation, finding) = brokers(process)?;
    sections.push(Section { about: "kafka", findings: vec![finding] });
    if process.config.redis.is_some() {
        sections.push(Section { about: "redis", findings: vec![redis(process)?] });
    }
    if let Some(search) = &process.config.search {
        sections.push(Section { about: "search", findings: vec![directory(&search.directory)] });
    }
    Ok(Looked { sections, source, generation })
}

async fn source(process: &Process, client: &Client, plan: &Plan) -> Result<Vec<Finding>, SetupError> {
    let failed = |error| SetupError::Failed { doing: "cannot look at the server".into(), error };
    let mut findings = check::server(client, &plan.slot).await.map_err(failed)?;
    findings.extend(check::tables(client, plan).await.map_err(failed)?);
    findings.extend(check::inheritance(client, &plan.queried).await.map_err(failed)?);
    findings.extend(stores(process, client).await?);
    Ok(findings)
}

/// Whether each counter and index can be kept from its table as it is.
async fn stores(process: &Process, client: &Client) -> Result<Vec<Finding>, SetupError> {
    let mut findings = Vec::new();
    for counter in &process.config.counters {
        let definition = &counter.definition;
        let Some(table) = described(client, definition.table()).await? else { continue };
        let store = format!("counters.{}", counter.name);
        let bound = definition.bind(&table).map(drop);
        findings.push(of_binding(client, &store, &table, &definition.referenced_columns(), bound).await?);
    }
    for index in process.config.search.iter().flat_map(|search| &search.indexes) {
        let Some(table) = described(client, (&index.schema, &index.table)).await? else { continue };
        let store = format!("search.{}", index.name);
        findings.push(of_binding(client, &store, &table, &index.columns(), index.bind(&table)).await?);
    }
    Ok(findings)
}

/// A table as the stream would describe it; `None` for one that is missing, which was said before.
async fn described(
    client: &Client,
    (schema, table): (&str, &str),
) -> Result<Option<TableSchema>, SetupError> {
    postgres::catalog::table_schema(client, schema, table).await.map_err(catalog_failed)
}

fn catalog_failed(error: tokio_postgres::Error) -> SetupError {
    SetupError::Failed { doing: "cannot read the catalog".into(), error }
}

/// Whether a store that names these columns can be kept.
async fn of_binding(
    client: &Client,
    store: &str,
    table: &TableSchema,
    columns: &[&str],
    bound: Result<(), Refusal>,
) -> Result<Finding, SetupError> {
    let Err(refusal) = bound else { return Ok(Finding::good(format!("{store} can be kept"))) };
    // To the stream a generated column is no column at all.
    let generated = generated(client, table, columns).await?;
    Ok(generated.map_or_else(
        || of_refusal(refusal),
        |column| {
            let name = table.full_name();
            Finding::wrong(
                format!("{store} names {column} of {name}, a generated column, which the stream does not carry"),
                format!(
                    "name the columns that it is computed from; or make it an ordinary one, which a trigger keeps: \
                     ALTER TABLE {} ALTER COLUMN {} DROP EXPRESSION",
                    table.quoted(),
                    postgres::plan::quote(&column)
                ),
            )
        },
    ))
}

/// The first of these columns that Postgres computes.
async fn generated(
    client: &Client,
    table: &TableSchema,
    columns: &[&str],
) -> Result<Option<String>, SetupError> {
    const GENERATED: &str = "SELECT attname::text FROM pg_catalog.pg_attribute
        WHERE attrelid = $1 AND attname = ANY ($2) AND attgenerated <> '' ORDER BY attnum LIMIT 1";
    let row = client.query_opt(GENERATED, &[&table.relation, &columns]).await.map_err(catalog_failed)?;
    Ok(row.map(|row| row.get(0)))
}

fn brokers(process: &Process) -> Result<(Option<Option<u32>>, Finding), Failure> {
    let kafka = process.kafka_briefly()?;
    // Any question will do; this one also says whether the pipeline has been set up before.
    Ok(match kafka::generations(&kafka, process.config.pipeline.as_str()) {
        Ok(known) => (
            Some(known.map(|known| known.current.number)),
            Finding::good(format!("Kafka answers at {}", kafka.bootstrap())),
        ),
        Err(KafkaError::Refused(refusal)) => (None, of_refusal(refusal)),
        Err(error) => (None, Finding::wrong(error.to_string(), "start Kafka, or correct `kafka.bootstrap`")),
    })
}

fn redis(process: &Process) -> Result<Finding, Failure> {
    let mut counters = process.counters()?;
    let names: Vec<&str> = process.config.counters.iter().map(|counter| counter.name.as_str()).collect();
    Ok(match counters.checkpoints(&names) {
        Ok(_) => Finding::good("Redis answers and evicts nothing"),
        Err(worker::SinkError::Refused(refusal)) => of_refusal(refusal),
        Err(error) => Finding::wrong(error.to_string(), "start Redis, or correct `redis.url`"),
    })
}

fn directory(directory: &Path) -> Finding {
    let probe = directory.join(".millrace-probe");
    let tried = std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(&probe, b""))
        .and_then(|()| std::fs::remove_file(&probe));
    match tried {
        Ok(()) => Finding::good(format!("{} can be written", directory.display())),
        Err(error) => Finding::wrong(
            format!("{} cannot be written: {error}", directory.display()),
            format!(
                "mkdir -p {0} and make it this user's, or correct `search.directory`",
                directory.display()
            ),
        ),
    }
}

fn of_problems(kafka: &Connection, problems: Vec<kafka::Problem>) -> Vec<Finding> {
    if problems.is_empty() {
        return vec![Finding::good(format!("the topics at {} are right", kafka.bootstrap()))];
    }
    problems.into_iter().map(of_problem).collect()
}

/// A topic that is not as it should be.
pub(crate) fn of_problem(problem: kafka::Problem) -> Finding {
    let Refusal { what, remedy } = problem.refusal;
    if problem.fatal { Finding::wrong(what, remedy) } else { Finding::advice(what, remedy) }
}

/// What `setup` makes at the source.
async fn objects(client: &Client, plan: &Plan) -> Result<Vec<Finding>, SetupError> {
    let failed = |error| SetupError::Failed { doing: "cannot look at the pipeline's objects".into(), error };
    let mut findings = vec![check::heartbeat(client, plan).await.map_err(failed)?];
    match check::publication(client, plan).await.map_err(failed)? {
        None => findings.push(missing(format!("publication {} does not exist", plan.publication))),
        Some(publication) => {
            for table in &publication.missing {
                findings.push(missing(format!("publication {} lacks table {table}", plan.publication)));
            }
            if publication.missing.is_empty() && publication.findings.is_empty() {
                findings.push(Finding::good(format!("publication {} is right", plan.publication)));
            }
            findings.extend(publication.findings);
        }
    }
    findings.push(match check::slot(client, &plan.slot).await.map_err(failed)? {
        None => missing(format!("slot {} does not exist", plan.slot)),
        Some(slot) => slot.wrong.unwrap_or_else(|| Finding::good(format!("slot {} stands", plan.slot))),
    });
    Ok(findings)
}

fn missing(what: String) -> Finding {
    Finding::wrong(what, "millrace setup")
}

fn of_refusal(refusal: Refusal) -> Finding {
    Finding::wrong(refusal.what, refusal.remedy)
}

fn of_failure(failure: Failure) -> Finding {
    match failure {
        Failure::Refused(mut refusals) if !refusals.is_empty() => of_refusal(refusals.remove(0)),
        other => Finding::wrong(
            other.to_string().trim().trim_start_matches("error: ").to_owned(),
            "start Postgres, or correct `postgres.url`",
        ),
    }
}

fn unreachable(error: &SetupError) -> Finding {
    Finding::wrong(error.to_string(), "see the server's log")
}

fn mark(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Good => "ok",
        Verdict::Advice => "advice",
        Verdict::Wrong => "WRONG",
    }
}

fn print_table(sections: &[Section]) {
    let mut table = super::status::table(&["", "about", "what", "remedy"]);
    for section in sections {
        for finding in &section.findings {
            table.add_row([mark(finding.verdict), section.about, &finding.what, &finding.remedy]);
        }
    }
    super::status::print_table(&table);
}

#[derive(Serialize)]
struct Line<'a> {
    about: &'a str,
    verdict: &'static str,
    what: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    remedy: &'a str,
}

fn print_json(sections: &[Section]) {
    for section in sections {
        for Finding { what, verdict, remedy } in &section.findings {
            let verdict = match verdict {
                Verdict::Good => "good",
                Verdict::Advice => "advice",
                Verdict::Wrong => "wrong",
            };
            super::print_line(&Line { about: section.about, verdict, what, remedy });
        }
    }
}
