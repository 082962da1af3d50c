//! `millrace rebuild`: asks for stores to be built anew, and watches it.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use change::Refusal;
use kafka::{Names, ReadUntil};
use serde::Serialize;

use super::stores::{Stores, configured, names};
use crate::cli::Format;
use crate::failure::{Failure, Outcome};
use crate::wiring::Process;

/// Between two looks at the stores.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Requested<'a> {
    store: &'a str,
    /// `false`: it was asked for before, and goes on.
    requested: bool,
}

#[derive(Serialize)]
struct Progress<'a> {
    store: &'a str,
    /// Whether the new store has taken the old one's place.
    done: bool,
    /// Absent before it has begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<i64>,
    log_end: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    records_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_left: Option<f64>,
}

/// Records the requests; with `wait`, ends when all are done.
pub(crate) fn execute(process: &Process, wanted: &[String], wait: bool, format: Format) -> Outcome {
    let all: Vec<String> = configured(process).into_iter().map(|(name, _)| name).collect();
    let mut stores = Vec::new();
    for name in wanted {
        let found = resolve(name, &all)?;
        stores.extend(found.into_iter().filter(|store| !stores.contains(store)).collect::<Vec<_>>());
    }
    for store in &stores {
        let requested = request(process, store)?;
        if format.json {
            super::print_line(&Requested { store, requested });
        } else if requested {
            println!(
                "{store}: its worker builds it anew, within seconds or when it is started; until then readers see \
                 the present one"
            );
        } else {
            println!("{store}: is being built anew already, and goes on");
        }
    }
    if wait {
        return watch(process, stores, format);
    }
    if !format.json {
        println!("millrace status shows how far it is");
    }
    Ok(())
}

/// The stores that a name means.
pub(super) fn resolve(name: &str, all: &[String]) -> Result<Vec<String>, Refusal> {
    let kind = |kind: &str| all.iter().filter(|store| store.starts_with(kind)).cloned().collect::<Vec<_>>();
    let found = match name {
        "counters" => kind("counters."),
        "search" => kind("search."),
        name if all.iter().any(|store| store == name) => vec![name.to_owned()],
        name => {
            let bare = |store: &&String| store.split_once('.').is_some_and(|(_, bare)| bare == name);
            let found: Vec<String> = all.iter().filter(bare).cloned().collect();
            if found.len() > 1 {
                let remedy = format!("name one of these: {}", names(&found));
                return Err(Refusal::new(format!("`{name}` can mean several stores"), remedy));
            }
            found
        }
    };
    if !found.is_empty() {
        return Ok(found);
    }
    let remedy = match all {
        [] => "configure one: [counters.NAME] or [search.indexes.NAME]".to_owned(),
        all => format!("name counters, search, or one of these: {}", names(all)),
    };
    Err(Refusal::new(format!("there is no store `{name}`"), remedy))
}

fn request(process: &Process, store: &str) -> Result<bool, Failure> {
    if let Some(counter) = store.strip_prefix("counters.") {
        return Ok(process.counters()?.rebuild(counter)?);
    }
    let index = store.trim_start_matches("search.");
    match &process.config.search {
        Some(search) => Ok(tantivy_search::request_rebuild(&search.directory, index)?),
        None => Err(Refusal::new(format!("there is no store `{store}`"), "write a section [search]").into()),
    }
}

/// Whether a store's copy has not taken its place yet.
fn pending(process: &Process, store: &str) -> Result<bool, Failure> {
    if let Some(counter) = store.strip_prefix("counters.") {
        return Ok(process.counters()?.copies(&[counter])?.iter().any(Option::is_some));
    }
    let index = store.trim_start_matches("search.");
    let search = process.config.search.as_ref();
    Ok(search.is_some_and(|search| tantivy_search::rebuild_requested(&search.directory, index)))
}

fn watch(process: &Process, mut stores: Vec<String>, format: Format) -> Outcome {
    let kafka = process.kafka_briefly()?;
    // That is where copies are built from.
    let newest = process.generations(&kafka)?.newest().number;
    let log = Names::new(process.config.pipeline.as_str(), newest)?;
    let mut read = Stores::new(process, &stores)?;
    let mut before: BTreeMap<String, (Instant, i64)> = BTreeMap::new();
    loop {
        let end = kafka::read_ledger(&kafka, &log, ReadUntil::Committed)?.progress;
        let log_end = end.map_or(0, |progress| progress.log_end);
        let found = read.read();
        for store in std::mem::take(&mut stores) {
            if !pending(process, &store)? {
                let progress = Progress {
                    store: &store,
                    done: true,
                    offset: None,
                    log_end,
                    records_per_second: None,
                    seconds_left: None,
                };
                tell(&progress, format);
                continue;
            }
            let rebuild = found.iter().find(|found| found.store == store).and_then(|s| s.rebuild.as_ref());
            let offset = rebuild.and_then(|rebuild| rebuild.next_offset);
            let now = offset.map(|offset| (Instant::now(), offset));
            let rate = before.get(&store).zip(now).and_then(|(before, now)| rate(*before, now));
            let left = |(rate, offset): (f64, i64)| (log_end - offset).max(0) as f64 / rate;
            let progress = Progress {
                store: &store,
                done: false,
                offset,
                log_end,
                records_per_second: rate,
                seconds_left: rate.zip(offset).map(left),
            };
            tell(&progress, format);
            if let Some(now) = now {
                before.insert(store.clone(), now);
            }
            stores.push(store);
        }
        if stores.is_empty() {
            return Ok(());
        }
        thread::sleep(LOOK);
    }
}

/// Records a second between two looks, if there were any.
fn rate((then, before): (Instant, i64), (now, offset): (Instant, i64)) -> Option<f64> {
    let rate = (offset - before) as f64 / (now - then).as_secs_f64();
    (rate.is_finite() && rate > 0.0).then_some(rate)
}

fn tell(progress: &Progress<'_>, format: Format) {
    if format.json {
        return super::print_line(progress);
    }
    let Progress { store, log_end, .. } = progress;
    let line = match (progress.done, progress.offset) {
        (true, _) => format!("{store}: the new one has taken the old one's place"),
        (_, None) => format!("{store}: waits for its worker to begin"),
        (_, Some(offset)) => {
            let pace = match (progress.records_per_second, progress.seconds_left) {
                (Some(rate), Some(left)) => format!(", {rate:.0} records/s, {left:.0} s left"),
                _ => String::new(),
            };
            format!("{store}: offset {offset} of {log_end}{pace}")
        }
    };
    println!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_where_they_mean_one_thing() {
        let all = ["counters.unread", "counters.mails", "search.mails", "search.notes"].map(str::to_owned);
        let found = |name| resolve(name, &all).map(|found| found.join(" ")).map_err(|refusal| refusal.what);
        assert_eq!(found("counters").unwrap(), "counters.unread counters.mails");
        assert_eq!(found("search").unwrap(), "search.mails search.notes");
        assert_eq!(found("search.mails").unwrap(), "search.mails");
        assert_eq!(found("notes").unwrap(), "search.notes");
        assert!(found("mails").unwrap_err().contains("several"));
        let refusal = resolve("nothing", &all).unwrap_err();
        assert!(refusal.remedy.contains("search.notes"), "{refusal}");
    }
}
