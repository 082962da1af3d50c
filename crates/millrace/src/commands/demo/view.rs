//! What people see: a table that is drawn again in its place on a terminal, single lines elsewhere.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use super::look::{Answer, Look};
use super::probe::Latency;
use super::traffic::SoFar;

/// A line that a terminal would break could not be drawn over.
const WIDTH: usize = 79;

/// The view, and what of it stands on the terminal now.
pub(super) struct View {
    terminal: bool,
    seconds: u32,
    table: Vec<String>,
}

impl View {
    pub(super) fn new(terminal: bool, seconds: u32) -> Self {
        View { terminal, seconds, table: Vec::new() }
    }

    /// Shows the state of things.
    pub(super) fn show(&mut self, at: Duration, traffic: SoFar, look: &Look, latency: &Latency) {
        if self.terminal {
            let table = table(at, self.seconds, traffic, look, latency);
            self.draw("", table);
        } else {
            print(&line(at, traffic, look, latency));
        }
    }

    /// Shows something that happened; on a terminal it stays above the table.
    pub(super) fn event(&mut self, at: Duration, what: &str) {
        self.draw(&format!("{:>5.1} s  {what}\n", at.as_secs_f64()), self.table.clone());
    }

    /// Replaces the table that stands there by `above`, which is to stay, and another table.
    fn draw(&mut self, above: &str, table: Vec<String>) {
        let mut text = String::new();
        if !self.table.is_empty() {
            // Up to where it begins, and clear from there.
            let _ = write!(text, "\x1b[{}A\x1b[J", self.table.len());
        }
        text.push_str(above);
        for line in &table {
            text.extend(line.chars().take(WIDTH));
            text.push('\n');
        }
        self.table = table;
        print(&text);
    }
}

/// Whoever reads it may have gone; the demo goes on.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn table(at: Duration, seconds: u32, traffic: SoFar, look: &Look, latency: &Latency) -> Vec<String> {
    let mut lines = vec![
        String::new(),
        format!(
            "{:>4.0} s of {seconds}    {} transactions, {} more rolled back    {} mails",
            at.as_secs_f64(),
            traffic.committed,
            traffic.rolled_back,
            look.mails
        ),
        String::new(),
        format!("  {:<12}{:>12}{:>12}", "unread of", "Postgres", "Redis"),
    ];
    for user in &look.users {
        let redis = user.redis.as_deref().unwrap_or("-");
        lines.push(format!("  {:<12}{:>12}{:>12}", user.name, user.postgres, redis));
    }
    lines.push(String::new());
    lines.push(format!("  search      {}", search(look)));
    let best = look.search.answer.as_ref().map_or("", Answer::first);
    lines.push(format!("              {best}"));
    lines.push(format!("  behind      {}", behind(look)));
    lines.push(format!("  from COMMIT to {}", latencies(latency)));
    lines
}

fn line(at: Duration, traffic: SoFar, look: &Look, latency: &Latency) -> String {
    let user = |user: &super::look::User| {
        format!("{} {}/{}", user.name, user.postgres, user.redis.as_deref().unwrap_or("-"))
    };
    let users: Vec<String> = look.users.iter().take(3).map(user).collect();
    format!(
        "{:>5.1} s  {} transactions | unread, Postgres/Redis: {} | {} | from COMMIT to {}\n",
        at.as_secs_f64(),
        traffic.committed,
        users.join(", "),
        search(look),
        latencies(latency)
    )
}

fn search(look: &Look) -> String {
    match &look.search.answer {
        Some(found) => {
            let Answer { estimated_total_hits: hits, processing_time_ms: time, .. } = found;
            format!("{}: {hits} hits in {time} ms", look.search.query)
        }
        None => format!("{}: no answer", look.search.query),
    }
}

fn behind(look: &Look) -> String {
    let part = |(name, bytes): &(&str, Option<u64>)| match bytes {
        Some(bytes) => format!("{name} {:.1} kB", *bytes as f64 / 1000.0),
        None => format!("{name} -"),
    };
    look.behind.iter().map(part).collect::<Vec<_>>().join(", ")
}

fn latencies(latency: &Latency) -> String {
    let shown =
        |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{} ms", time.as_millis()));
    format!("Redis {}, to search {}", shown(latency.counters), shown(latency.search))
}
