//! Pages by id: complete while everything moves.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde_json::Value;

use crate::bench::{Bench, Server};

fn mail(id: u32) -> [String; 7] {
    [&id.to_string(), "inbox", "subject", "body", "f", "1", "~"].map(str::to_owned)
}

fn walk(server: &Server, limit: usize) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    loop {
        let after = ids.last().map_or(String::new(), |last| format!("&after={last}"));
        let (status, page) = server.get(&format!("/indexes/emails/documents?limit={limit}{after}"));
        assert_eq!(status, 200, "{page}");
        let found = page["results"].as_array().unwrap();
        if found.is_empty() {
            return ids;
        }
        ids.extend(found.iter().map(|document: &Value| document["id"].to_string()));
    }
}

#[test]
fn pages_are_in_the_order_of_ids_over_all_segments() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    for round in 0..5 {
        for id in (round..100).step_by(5) {
            bench.insert(&mail(id).each_ref().map(String::as_str));
        }
        bench.commit();
    }
    for id in (0..100).step_by(3) {
        let mail = mail(id);
        bench.delete(&mail.each_ref().map(String::as_str));
    }
    for id in (0..100).step_by(7) {
        bench.insert(&mail(id).each_ref().map(String::as_str));
    }
    bench.commit();
    let expected: BTreeSet<String> =
        (0..100).filter(|id| id % 3 != 0 || id % 7 == 0).map(|id: u32| id.to_string()).collect();
    let server = Server::start(&bench.indexes);
    assert_eq!(walk(&server, 7), expected.iter().cloned().collect::<Vec<_>>());
    let (_, page) = server.get("/indexes/emails/documents?offset=10&limit=3&after=2");
    let rest: Vec<&String> = expected.iter().filter(|id| id.as_str() > "2").skip(10).take(3).collect();
    let found: Vec<String> =
        page["results"].as_array().unwrap().iter().map(|document| document["id"].to_string()).collect();
    assert_eq!(found.iter().collect::<Vec<_>>(), rest);
    assert_eq!(page["total"].as_u64(), Some(expected.len() as u64));
}

#[test]
fn a_walk_under_commits_misses_no_document_that_stays() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    // Even ids stay (some are rewritten), odd ones come and go.
    for id in (0..400).step_by(2) {
        bench.insert(&mail(id).each_ref().map(String::as_str));
    }
    bench.commit();
    let server = Server::start(&bench.indexes);
    let (stop, commits) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let round = commits.load(Ordering::Relaxed);
                for n in 0..20 {
                    let id = (round * 37 + n * 19) % 400;
                    let mail = mail(id);
                    let mail = mail.each_ref().map(String::as_str);
                    if id % 2 == 0 || round % 2 == 0 { bench.insert(&mail) } else { bench.delete(&mail) }
                }
                bench.commit();
                commits.fetch_add(1, Ordering::Relaxed);
            }
        });
        let walks = || {
            for walk_number in 0.. {
                let ids = walk(&server, 13);
                let unique: BTreeSet<&String> = ids.iter().collect();
                assert_eq!(unique.len(), ids.len(), "none twice");
                assert!(ids.is_sorted());
                let missing =
                    (0..400).step_by(2).map(|id: u32| id.to_string()).find(|id| !unique.contains(id));
                assert_eq!(missing, None);
                if writer.is_finished() || (walk_number >= 5 && commits.load(Ordering::Relaxed) >= 10) {
                    return;
                }
            }
        };
        // The writer ends also when a walk fails.
        let walked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(walks));
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        walked.unwrap();
    });
}
