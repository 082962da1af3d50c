//! The routes over a real socket: answers, errors, waits.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use worker::Sink;

use crate::bench::{Bench, Server};

/// Five mails; the third has no size and no date.
fn mailbox(directory: &std::path::Path) -> (Bench, Server) {
    let mut bench = Bench::new(directory);
    for mail in [
        [
            "1",
            "inbox",
            "Lunch on Friday",
            "Pizza or pasta? Pizza again.",
            "f",
            "10",
            "2025-01-01 00:00:00+00",
        ],
        [
            "2",
            "inbox",
            "Minutes",
            "We talked about pizza at length, and about many other things.",
            "t",
            "9.5",
            "2025-03-01 00:00:00+00",
        ],
        ["3", "trash", "Größe", "straße", "f", "~", "~"],
        [
            "4",
            "it's \"odd\"",
            "Pasta recipe",
            "Boil the pasta. No tomatoes.",
            "f",
            "10",
            "2025-02-01 00:00:00+00",
        ],
        ["10", "", "Nothing", "", "t", "-3", "infinity"],
    ] {
        bench.insert(&mail);
    }
    bench.commit();
    let server = Server::start(&bench.indexes);
    (bench, server)
}

#[test]
fn words_are_ranked_by_bm25() {
    let directory = tempfile::tempdir().unwrap();
    let (_bench, server) = mailbox(directory.path());
    assert_eq!(server.hits(json!({"q": "pizza"})), [1, 2], "more often, and in a shorter text");
    assert_eq!(server.hits(json!({"q": "PIZZA talked"})), [2, 1], "the rare word weighs more");
    assert_eq!(server.hits(json!({"q": "pizza pasta", "matchingStrategy": "all"})), [1]);
    assert_eq!(server.hits(json!({"q": "\"pizza or pasta\""})), [1]);
    assert_eq!(server.hits(json!({"q": "\"pasta or pizza\""})), [0i64; 0]);
    assert_eq!(server.hits(json!({"q": "pasta -pizza"})), [4]);
    assert_eq!(server.hits(json!({"q": "pasta -\"or pasta\""})), [4]);
    assert_eq!(server.hits(json!({"q": "größe"})), [3]);
    assert_eq!(server.hits(json!({"q": "STRASSE"})), [0i64; 0]);
    assert_eq!(server.hits(json!({"q": "inbox"})), [0i64; 0], "exact columns are not searched");
    assert_eq!(server.hits(json!({"q": "?!"})), [0i64; 0]);
    assert_eq!(server.hits(json!({"q": "-pizza"})).len(), 3);
    assert_eq!(server.hits(json!({})), [1, 10, 2, 3, 4], "no words: in the order of the ids' text");
    assert_eq!(server.hits(json!({"q": "pasta \"unclosed pizza"})), [0i64; 0]);
}

#[test]
fn an_answer_has_meilisearchs_shape() {
    let directory = tempfile::tempdir().unwrap();
    let (bench, server) = mailbox(directory.path());
    let (status, answer) =
        server.get("/indexes/emails/search?q=pizza&limit=1&attributesToRetrieve=id,subject,nothing");
    assert_eq!(status, 200);
    let took = answer["processingTimeMs"].as_u64().unwrap();
    assert_eq!(
        answer,
        json!({
            "hits": [{"id": 1, "subject": "Lunch on Friday"}], "query": "pizza", "processingTimeMs": took,
            "limit": 1, "offset": 0, "estimatedTotalHits": 2, "lsn": bench.at.lsn.to_string(),
        })
    );
    let page = |offset, limit| server.hits(json!({"q": "", "offset": offset, "limit": limit}));
    assert_eq!((page(0, 2), page(2, 2), page(4, 2), page(9, 2)), (vec![1, 10], vec![2, 3], vec![4], vec![]));
    let (_, counted) = server.post("/indexes/emails/search", &json!({"q": "pizza", "limit": 0}));
    assert_eq!((&counted["hits"], &counted["estimatedTotalHits"]), (&json!([]), &json!(2)));
    let (_, empty) = server.post_text("/indexes/emails/search", "");
    assert_eq!((empty["limit"].as_u64(), empty["estimatedTotalHits"].as_u64()), (Some(20), Some(5)));
}

#[test]
fn words_are_marked_and_texts_cropped() {
    let directory = tempfile::tempdir().unwrap();
    let (_bench, server) = mailbox(directory.path());
    let formatted =
        |body: Value| server.post("/indexes/emails/search", &body).1["hits"][0]["_formatted"].clone();
    assert_eq!(
        formatted(json!({"q": "pizza friday", "attributesToHighlight": ["*"]})),
        json!({
            "id": "1", "subject": "Lunch on <em>Friday</em>", "is_read": false, "folder": "inbox", "size": "10",
            "body": "<em>Pizza</em> or pasta? <em>Pizza</em> again.", "sent_at": "2025-01-01T00:00:00.000000Z",
        })
    );
    let body = json!({
        "q": "\"about many\"", "attributesToRetrieve": ["id"], "attributesToCrop": ["body:4"],
        "attributesToHighlight": ["body"], "highlightPreTag": "[", "highlightPostTag": "]", "cropMarker": "..",
    });
    assert_eq!(formatted(body), json!({"id": "2", "body": "..length, and [about] [many].."}));
    assert_eq!(formatted(json!({"q": "pizza"})), Value::Null);
}

#[test]
fn sorting_puts_nulls_last_and_ties_in_the_order_of_ids() {
    let directory = tempfile::tempdir().unwrap();
    let (_bench, server) = mailbox(directory.path());
    assert_eq!(server.hits(json!({"sort": ["size:asc"]})), [10, 2, 1, 4, 3]);
    assert_eq!(server.hits(json!({"sort": ["size:desc"]})), [1, 4, 2, 10, 3]);
    assert_eq!(server.hits(json!({"sort": ["sent_at:desc"]})), [10, 2, 4, 1, 3]);
    assert_eq!(server.hits(json!({"sort": ["size:desc", "sent_at:desc"]})), [4, 1, 2, 10, 3]);
    assert_eq!(server.hits(json!({"q": "pizza pasta", "sort": ["sent_at:asc"], "limit": 2})), [1, 4]);
    assert_eq!(server.hits(json!({"sort": ["size:asc"], "offset": 1, "limit": 2})), [2, 1]);
}

#[test]
fn mistakes_have_meilisearchs_bodies() {
    let directory = tempfile::tempdir().unwrap();
    let (_bench, server) = mailbox(directory.path());
    let long = "x".repeat(3_000);
    for (body, code, part) in [
        (
            json!({"filter": "subject = x"}),
            "invalid_search_filter",
            "`subject` is not filterable. Available filterable attributes are: `folder`, `is_read`, `size`, `sent_at`.",
        ),
        (json!({"filter": "nope EXISTS"}), "invalid_search_filter", "`nope` is not filterable"),
        (json!({"filter": "size = many"}), "invalid_search_filter", "`many`, which is not a number"),
        (json!({"filter": "sent_at > soon"}), "invalid_search_filter", "not a date"),
        (json!({"filter": "folder > a"}), "invalid_search_filter", "for equality only"),
        (json!({"filter": "size ="}), "invalid_search_filter", "a value"),
        (json!({"filter": 5}), "invalid_search_filter", "must be a string"),
        (
            json!({"sort": ["folder:asc"]}),
            "invalid_search_sort",
            "not sortable. Available sortable attributes are: `size`, `sent_at`",
        ),
        (json!({"sort": ["size"]}), "invalid_search_sort", "`size:asc`"),
        (json!({"sort": ["size:asc", "size:asc", "size:asc"]}), "invalid_search_sort", "at most 2"),
        (json!({"limit": 1_001}), "invalid_search_limit", "from 0 to 1000"),
        (json!({"limit": -1}), "invalid_search_limit", "from 0 to 1000"),
        (json!({"limit": "1"}), "invalid_search_limit", "a number"),
        (json!({"offset": 10_001}), "invalid_search_offset", "from 0 to 10000"),
        (json!({"q": 1}), "invalid_search_q", "a string"),
        (json!({"q": long}), "invalid_search_q", "2048 bytes"),
        (json!({"matchingStrategy": "best"}), "invalid_search_matching_strategy", "`last`"),
        (json!({"attributesToHighlight": "body"}), "invalid_search_attributes_to_highlight", "a list"),
        (json!({"min_lsn": "5"}), "invalid_min_lsn", "`5` is not an LSN"),
        (json!({"min_lsn": "0/5", "timeout": 100_000}), "invalid_timeout", "60000"),
        (json!({"facets": ["folder"]}), "bad_request", "Unknown parameter `facets`: expected one of `q`"),
    ] {
        let (status, error) = server.post("/indexes/emails/search", &body);
        assert_eq!((status, error["code"].as_str()), (400, Some(code)), "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request");
        assert!(error["link"].is_string());
    }
    let code = |(status, error): (u16, Value)| (status, error["code"].as_str().unwrap().to_owned());
    assert_eq!(code(server.post_text("/indexes/emails/search", "{")), (400, "malformed_payload".into()));
    assert_eq!(code(server.post_text("/indexes/emails/search", "[]")), (400, "malformed_payload".into()));
    let shell = json!({"q": ""}).to_string().len();
    let huge = json!({"q": "x".repeat((1 << 20) + 1 - shell)}).to_string();
    assert_eq!(code(server.post_text("/indexes/emails/search", &huge)), (413, "payload_too_large".into()));
    assert_eq!(code(server.get("/indexes/else/search")), (404, "index_not_found".into()));
    assert_eq!(code(server.get("/indexes/else")), (404, "index_not_found".into()));
    assert_eq!(code(server.get("/indexes/emails/documents/77")), (404, "document_not_found".into()));
    assert_eq!(code(server.get("/indexes/emails/documents?limit=x")), (400, "invalid_document_limit".into()));
    assert_eq!(code(server.get("/nowhere")), (404, "not_found".into()));
    assert_eq!(code(server.post("/health", &json!({}))), (405, "bad_request".into()));
}

#[test]
fn documents_come_with_the_checkpoint_they_belong_to() {
    let directory = tempfile::tempdir().unwrap();
    let (bench, server) = mailbox(directory.path());
    let checkpoint = json!({
        "lsn": bench.at.lsn.to_string(), "next_offset": 5, "log": "the log", "generation": 1,
        "definition": bench.at.definition, "ready": true, "skipped": [],
    });
    let (_, page) = server.get("/indexes/emails/documents?offset=1&limit=2&fields=id,folder");
    assert_eq!(
        page,
        json!({
            "results": [{"id": 10, "folder": ""}, {"id": 2, "folder": "inbox"}],
            "offset": 1, "limit": 2, "total": 5, "checkpoint": checkpoint,
        })
    );
    let (_, fetched) =
        server.post("/indexes/emails/documents/fetch", &json!({"ids": ["4", 77, 1], "fields": ["id"]}));
    assert_eq!(fetched["results"], json!([{"id": 4}, {"id": 1}]));
    assert_eq!(fetched["checkpoint"], checkpoint);
    let (_, one) = server.get("/indexes/emails/documents/4?fields=subject");
    assert_eq!(one, json!({"subject": "Pasta recipe"}));
    let (_, listed) = server.get("/indexes");
    assert_eq!(listed["results"][0]["uid"], "emails");
    assert_eq!(listed["results"][0]["primaryKey"], "id");
    assert_eq!(listed["results"][0]["numberOfDocuments"], 5);
    assert_eq!(listed["results"][0]["checkpoint"], checkpoint);
}

#[test]
fn an_index_that_is_being_filled_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    let code = |path: &str| {
        let (status, error) = server.get(path);
        (status, error["code"].as_str().map(str::to_owned))
    };
    let not_ready = (503, Some("index_not_ready".to_owned()));
    assert_eq!(code("/indexes/emails/search"), not_ready);
    assert_eq!(code("/indexes/emails/documents/1"), not_ready);
    assert_eq!(code("/indexes/emails/search?min_lsn=0/0&timeout=10"), not_ready);
    assert_eq!(
        server.get("/health"),
        (
            503,
            json!({
                "status": "unavailable", "indexes": ["emails"], "message": "Being filled from the log: emails.",
                "code": "index_not_ready", "type": "system", "link": "",
            })
        )
    );
    // Who looks at documents is told.
    let (status, page) = server.get("/indexes/emails/documents");
    assert_eq!((status, &page["checkpoint"]["ready"]), (200, &json!(false)));
    bench.insert(&["1", "a", "b", "c", "t", "1", "~"]);
    bench.commit();
    assert_eq!(server.get("/health"), (200, json!({"status": "available"})));
}

#[test]
fn h45_a_search_waits_for_the_lsn_it_is_given() {
    let directory = tempfile::tempdir().unwrap();
    let (mut bench, server) = mailbox(directory.path());
    let now = bench.at.lsn;
    let search = |lsn: change::Lsn, timeout: u64| {
        server.post(
            "/indexes/emails/search",
            &json!({"q": "late", "min_lsn": lsn.to_string(), "timeout": timeout}),
        )
    };
    assert_eq!(search(now, 0).0, 200, "no wait for what is there");
    let (status, error) = search(change::Lsn(now.0 + 8), 50);
    assert_eq!(
        (status, error),
        (
            504,
            json!({
                "message": format!("Index `emails` stands at {now} and did not reach {} within 50 ms.", change::Lsn(now.0 + 8)),
                "code": "lsn_not_reached", "type": "system", "link": "",
            })
        )
    );
    bench.insert(&["20", "a", "late", "c", "t", "1", "~"]);
    assert!(!bench.sink.due_in(1).is_zero());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| search(change::Lsn(now.0 + 8), 20_000));
        testkit::services::wait_until("the wait to begin", Duration::from_secs(10), || {
            // A waiting reader shortens the pause between two commits to 50 ms.
            bench.sink.due_in(50_001).is_zero().then_some(())
        });
        bench.commit();
        let (status, answer) = waiting.join().unwrap();
        assert_eq!((status, answer["hits"][0]["id"].as_i64()), (200, Some(20)), "{answer}");
        assert_eq!(answer["lsn"], change::Lsn(now.0 + 8).to_string());
    });
}

#[test]
fn a_shutdown_ends_waits_and_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let (mut bench, server) = mailbox(directory.path());
    bench.insert(&["20", "a", "staged", "c", "t", "1", "~"]);
    let later = change::Lsn(bench.at.lsn.0 + 8).to_string();
    let begun = Instant::now();
    let path = format!("/indexes/emails/search?min_lsn={later}&timeout=60000");
    assert_eq!(server.get("/health").0, 200);
    let address = server.address();
    let waiting = std::thread::spawn(move || {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        agent.get(format!("http://{address}{path}")).call().map(|response| response.status().as_u16())
    });
    testkit::services::wait_until("the wait to begin", Duration::from_secs(10), || {
        bench.sink.due_in(50_001).is_zero().then_some(())
    });
    server.stop().unwrap();
    assert_eq!(waiting.join().unwrap().unwrap(), 503);
    assert!(begun.elapsed() < Duration::from_secs(9), "it did not drain to the bound");
}
