// A page opened from the disk may not start a Worker, and search wants one. There, and
// only there, run the worker's script in a hidden frame that passes the same messages.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const room = frame.contentWindow;
      room.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = room.document.createElement("script");
      this.ready = new Promise(done => { script.onload = () => done(room); });
      script.src = new URL(url, location.href);
      room.document.body.append(script);
    }
    async postMessage(data) {
      const room = await this.ready;
      room.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
  window.Worker = window.IFrameWorker;
}
