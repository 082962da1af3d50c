//! Connection strings as libpq writes them, taken apart into keyword and value.
//!
//! Both forms are read: `postgres://user:password@host:port,host:port/db?keyword=value` and `host=... port=...`.
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>

use percent_encoding::percent_decode_str;

use crate::config::ConfigError;

/// Keywords with their values, in the order of the text. The last of several equal ones counts.
pub(crate) type Pairs = Vec<(String, String)>;

/// Takes a connection string apart. A URL's hosts and ports become one `host` and one `port`, joined by commas.
pub(crate) fn parse(text: &str) -> Result<Pairs, ConfigError> {
    let text = text.trim();
    match text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://")) {
        Some(rest) => url(rest),
        None if text.is_empty() || text.contains('=') => keywords(text),
        None => Err(ConfigError::Malformed("expected postgres://... or keyword=value pairs".into())),
    }
}

fn url(rest: &str) -> Result<Pairs, ConfigError> {
    let mut pairs = Pairs::new();
    let (before_query, query) = match rest.find('?') {
        Some(at) => (&rest[..at], &rest[at + 1..]),
        None => (rest, ""),
    };
    let (authority, database) = before_query.split_once('/').unwrap_or((before_query, ""));
    let (credentials, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
    let (host, port) = hosts_and_ports(hosts)?;
    for (keyword, value) in [("user", user), ("password", password), ("dbname", database), ("host", &host)] {
        if !value.is_empty() {
            pairs.push((keyword.into(), decoded(value)?));
        }
    }
    if port.bytes().any(|byte| byte != b',') {
        pairs.push(("port".into(), port));
    }
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (keyword, value) = parameter
            .split_once('=')
            .ok_or_else(|| ConfigError::Malformed(format!("URL parameter `{parameter}` has no value")))?;
        pairs.push((decoded(keyword)?, decoded(value)?));
    }
    Ok(pairs)
}

/// `a:1,[::1],b` to `a,::1,b` and `1,,`.
fn hosts_and_ports(text: &str) -> Result<(String, String), ConfigError> {
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for part in text.split(',') {
        let (host, port) = match part.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((address, port))) => (address, port.strip_prefix(':').unwrap_or(port)),
            Some(None) => return Err(ConfigError::Malformed(format!("`{part}` has no closing bracket"))),
            None => part.split_once(':').unwrap_or((part, "")),
        };
        hosts.push(host);
        ports.push(port);
    }
    Ok((hosts.join(","), ports.join(",")))
}

fn decoded(text: &str) -> Result<String, ConfigError> {
    let decoded = percent_decode_str(text).decode_utf8();
    // The text may be a password: it is not repeated.
    decoded.map(Into::into).map_err(|_| ConfigError::Malformed("a percent-encoded part is not UTF-8".into()))
}

fn keywords(text: &str) -> Result<Pairs, ConfigError> {
    let mut pairs = Pairs::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (keyword, after) = rest
            .split_once('=')
            .ok_or_else(|| ConfigError::Malformed("a keyword without `=` in the connection string".into()))?;
        let (value, after) = keyword_value(after.trim_start())?;
        pairs.push((keyword.trim().to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// One value, quoted or not, and what follows it.
fn keyword_value(text: &str) -> Result<(String, &str), ConfigError> {
    let (quoted, body) = match text.strip_prefix('\'') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\'' if quoted => return Ok((value, &body[at + 1..])),
            c if !quoted && c.is_whitespace() => return Ok((value, &body[at..])),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    if quoted { Err(ConfigError::Malformed("a quoted value does not end".into())) } else { Ok((value, "")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> String {
        match parse(text) {
            Ok(pairs) => pairs.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join("|"),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn both_forms_are_taken_apart() {
        for (text, expected) in [
            ("", ""),
            ("postgres://", ""),
            ("postgres://h", "host=h"),
            (
                "postgresql://me:p%40:w@h:1/db?sslmode=require&application_name=a%20b",
                "user=me|password=p@:w|dbname=db|host=h|port=1|sslmode=require|application_name=a b",
            ),
            ("postgres://me@a:1,[::1]:2,c/", "user=me|host=a,::1,c|port=1,2,"),
            ("postgres:///db?host=/tmp&port=7", "dbname=db|host=/tmp|port=7"),
            ("postgres://%2Ftmp/db", "dbname=db|host=/tmp"),
            ("host=h  port = 1 password='a b\\'c' user=x\\ y", "host=h|port=1|password=a b'c|user=x y"),
            ("host='' user=u", "host=|user=u"),
            ("mysql://h", "error: expected postgres://... or keyword=value pairs"),
            ("postgres://h?a", "error: URL parameter `a` has no value"),
            ("user='a", "error: a quoted value does not end"),
        ] {
            assert_eq!(pairs(text), expected, "{text}");
        }
    }
}
