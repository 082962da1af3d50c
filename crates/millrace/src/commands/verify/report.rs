use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use serde::Serialize;
use serde_json::Value;
use verify::{Difference, NotVerified, Observer, Verified};

use crate::cli::Format;
use crate::commands::print_line;
use crate::commands::status::table;
use crate::failure::{Failure, Outcome};

/// Differences that people are shown.
const SHOWN: usize = 20;
/// Longest value that people are shown, characters.
const VALUE: usize = 60;
/// Progress is shown this often.
const TELL: Duration = Duration::from_millis(500);

/// Prints what is found: for programs as it is found, for people at the end.
pub(super) struct Report {
    json: bool,
    all: bool,
    /// Whether somebody watches.
    watched: bool,
    told: Instant,
    /// The width of the line of progress that stands there.
    line: usize,
    stores: Vec<Verified>,
    shown: Vec<Difference>,
    differences: u64,
    failures: usize,
}

/// A store that could not be compared, for programs.
#[derive(Serialize)]
struct Failed<'a> {
    store: &'a str,
    error: &'a str,
    remedy: &'a str,
}

impl Report {
    pub(super) fn new(format: Format, all: bool) -> Self {
        Report {
            json: format.json,
            all,
            watched: std::io::stderr().is_terminal(),
            told: Instant::now(),
            line: 0,
            stores: Vec::new(),
            shown: Vec::new(),
            differences: 0,
            failures: 0,
        }
    }

    /// Takes in how the comparison of a store ended.
    pub(super) fn store(&mut self, store: &str, result: Result<Verified, NotVerified>) {
        self.wipe();
        match result {
            Ok(verified) if self.json => print_line(&verified),
            Ok(verified) => self.stores.push(verified),
            Err(failure) => {
                self.failures += 1;
                if self.json {
                    print_line(&Failed { store, error: &failure.what, remedy: &failure.remedy });
                }
                let text = failure.to_string();
                let named = text.starts_with(store);
                eprintln!("error: {}{text}", if named { String::new() } else { format!("{store}: ") });
            }
        }
    }

    /// Prints what is left to be said, and says how it ended.
    pub(super) fn finish(self) -> Outcome {
        if !self.stores.is_empty() {
            let mut shown = table(&["STORE", "LSN", "CHECKED", "DIFFERENCES"]);
            for store in &self.stores {
                let Verified { store, lsn, checked, differences } = store;
                shown.add_row([store.clone(), lsn.to_string(), checked.to_string(), differences.to_string()]);
            }
            println!("{shown}");
        }
        for Difference { store, key, source, found } in &self.shown {
            println!("{store}  {key}: Postgres has {}, the store {}", self.value(source), self.value(found));
        }
        let hidden = self.differences - self.shown.len() as u64;
        if !self.json && hidden > 0 {
            println!("... and {hidden} more; --all prints them");
        }
        match (self.differences, self.failures) {
            (0, 0) => Ok(()),
            (0, failures) => Err(Failure::Failed(anyhow!(
                "{failures} of the stores could not be compared; nothing is said of them"
            ))),
            _ => Err(Failure::Different),
        }
    }

    fn value(&self, value: &Value) -> String {
        let text = match value {
            Value::Null => return "nothing".to_owned(),
            value => value.to_string(),
        };
        if self.all || text.chars().count() <= VALUE {
            return text;
        }
        text.chars().take(VALUE).chain("…".chars()).collect()
    }

    fn wipe(&mut self) {
        if self.line > 0 {
            eprint!("\r{:width$}\r", "", width = self.line);
            self.line = 0;
        }
    }
}

impl Observer for Report {
    fn difference(&mut self, difference: Difference) {
        self.differences += 1;
        if self.json {
            print_line(&difference);
        } else if self.all || self.shown.len() < SHOWN {
            self.shown.push(difference);
        }
    }

    fn progress(&mut self, store: &str, what: &str, done: u64) {
        if !self.watched || self.told.elapsed() < TELL {
            return;
        }
        self.told = Instant::now();
        self.wipe();
        let line = format!("{store}: {done} {what} so far");
        self.line = line.len();
        eprint!("{line}");
        // A line that cannot be shown is no reason to stop.
        let _ = std::io::stderr().flush();
    }
}
