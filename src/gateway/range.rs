//! Files over HTTP: whole, or the part that a `Range` asks for (RFC 9110, section 14).

use std::ops::Range;

use actix_web::{
    HttpRequest, HttpResponse, HttpResponseBuilder,
    http::header::{self, HeaderValue},
};

/// What is sent of a file, and the head of the answer that it is sent with.
pub struct Asked {
    pub response: HttpResponseBuilder,
    pub range: Range<u64>,
}

/// The whole of a file of `size` bytes, or the part of it that the request asks for. `tag` changes whenever the file does.
pub fn asked(request: &HttpRequest, tag: &str, size: u64) -> Result<Asked, Unsatisfiable> {
    let text = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let tag = format!("\"{tag}\"");
    // A part of something else than the caller has begun with is of no use to it.
    let same = text(header::IF_RANGE).is_none_or(|wanted| wanted == tag);
    let part = text(header::RANGE).filter(|_| same).and_then(|range| parse(range, size));
    let (mut response, range) = match part {
        None => (HttpResponse::Ok(), 0..size),
        Some(Err(unsatisfiable)) => return Err(unsatisfiable),
        Some(Ok(range)) => {
            let mut response = HttpResponse::PartialContent();
            let shown = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            response.insert_header((header::CONTENT_RANGE, shown));
            (response, range)
        }
    };
    response
        .insert_header((header::ACCEPT_RANGES, "bytes"))
        .insert_header((header::ETAG, tag))
        .content_type("application/octet-stream");
    Ok(Asked { response, range })
}

/// The range begins past the end.
#[derive(Debug, PartialEq)]
pub struct Unsatisfiable;

impl Unsatisfiable {
    /// The answer, about a file of `size` bytes.
    pub fn response(&self, size: u64) -> HttpResponse {
        let mut response = HttpResponse::RangeNotSatisfiable();
        response.insert_header((header::CONTENT_RANGE, format!("bytes */{size}"))).finish()
    }
}

/// The one range of a `Range` header; `None` for what is answered as if it were absent: several
/// ranges, other units, nonsense.
fn parse(header: &str, size: u64) -> Option<Result<Range<u64>, Unsatisfiable>> {
    let (first, last) = header.trim().strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = (first.trim(), last.trim());
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok())?;
    let range = match (first.is_empty(), last.is_empty()) {
        (true, true) => return None,
        (true, false) => size.saturating_sub(number(last)?)..size,
        (false, true) => number(first)?..size,
        (false, false) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return None;
            }
            first..last.saturating_add(1).min(size)
        }
    };
    Some(if range.start < range.end { Ok(range) } else { Err(Unsatisfiable) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_read_in_each_form() {
        for (header, range) in [
            ("bytes=0-3", 0..4),
            ("bytes=4-", 4..10),
            ("bytes=-3", 7..10),
            ("bytes=-30", 0..10),
            ("bytes=9-99", 9..10),
            ("bytes=0-18446744073709551615", 0..10),
        ] {
            assert_eq!(parse(header, 10), Some(Ok(range)), "{header}");
        }
    }

    #[test]
    fn a_range_past_the_end_is_unsatisfiable() {
        for header in ["bytes=10-", "bytes=10-12", "bytes=-0"] {
            assert_eq!(parse(header, 10), Some(Err(Unsatisfiable)), "{header}");
        }
    }

    #[test]
    fn anything_else_is_the_whole_file() {
        for header in ["bytes=0-1,3-4", "items=0-1", "bytes=-", "bytes=3-1", "bytes=+1-2", "bytes=a-b", ""] {
            assert_eq!(parse(header, 10), None, "{header}");
        }
    }
}
