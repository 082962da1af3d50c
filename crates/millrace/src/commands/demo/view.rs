//! What people see: a table that is drawn again in its place on a terminal, single lines elsewhere.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use super::look::Look;
use super::probe::Latency;
use super::traffic::SoFar;

/// A line that a terminal would break could not be drawn over.
const WIDTH: usize = 79;

/// The view, and how much of it is to be drawn over.
pub(super) struct View {
    terminal: bool,
    seconds: u32,
    drawn: usize,
}

impl View {
    pub(super) fn new(terminal: bool, seconds: u32) -> Self {
        View { terminal, seconds, drawn: 0 }
    }

    /// Shows the state of things.
    pub(super) fn show(&mut self, at: Duration, traffic: SoFar, look: &Look, latency: &Latency) {
        if self.terminal {
            self.draw(&table(at, self.seconds, traffic, look, latency));
        } else {
            print(&line(at, traffic, look, latency));
        }
    }

    /// Shows something that happened; on a terminal it stays above the table.
    pub(super) fn event(&mut self, at: Duration, what: String) {
        self.draw(&[]);
        print(&format!("{:>5.1} s  {what}\n", at.as_secs_f64()));
    }

    fn draw(&mut self, lines: &[String]) {
        let mut text = String::new();
        if self.drawn > 0 {
            // Up to where the last table begins, and clear from there.
            let _ = write!(text, "\x1b[{}A\x1b[J", self.drawn);
        }
        for line in lines {
            text.extend(line.chars().take(WIDTH));
            text.push('\n');
        }
        self.drawn = lines.len();
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
        Some(found) => format!(
            "{}: {} hits in {} ms: {}",
            look.search.query,
            found.estimated_total_hits,
            found.processing_time_ms,
            found.first()
        ),
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
