// Follows one job; when it is over the page is loaded anew with its result.

const job = document.getElementById("job");
const bar = document.getElementById("bar");
const done = document.getElementById("done");
const eta = document.getElementById("eta");
const state = document.getElementById("state");

function bytes(n) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return `${n >= 100 || unit === 0 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function show(event) {
  const now = JSON.parse(event.data);
  if (["succeeded", "failed", "cancelled"].includes(now.state)) {
    source.close();
    location.reload();
    return;
  }
  const { done: n, total, unit, eta_s: left } = now.progress;
  state.textContent = now.state === "queued" ? "waiting" : now.cancel_requested ? "stopping" : "running";
  if (total) {
    bar.max = total;
    bar.value = n;
    done.textContent = unit === "bytes" ? `${bytes(n)} of ${bytes(total)}` : `${n} of ${total} ${unit}`;
  } else if (now.state === "running") {
    done.textContent = "Reading the inputs";
  }
  eta.textContent = left === null ? "" : `${duration(left)} left`;
}

const source = new EventSource(job.dataset.events);
source.addEventListener("state", show);
source.addEventListener("progress", show);
